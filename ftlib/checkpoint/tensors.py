"""The tensors of a training state under stable names, into files and back.

`model.<name>` are the trainable parameters (all of them in a full fine-tune), persistent buffers, and once adapters
were merged while training (ftlib.adapters.relora) the weights below them;
`optim.state.<name>.<slot>` what the optimizer keeps for each parameter. Sharded tensors are written and read by their
owners; any other mesh, or none, reads the same files.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ftlib.adapters import relora
from ftlib.errors import UserError
from ftlib.optim import lisa
from ftlib.optim.base import Update

FILE_BYTES = 512 << 20  # of one file: each is built in host memory before it is written, and checked in parallel
STATE = "optim.state."
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # recompute and compile put these into names


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model.<name>` -> the live tensor: trainable parameters and persistent buffers, a tied one once."""
    every = {_plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    some_sleep = getattr(model, "lisa", None) is not None  # and train at other times
    changed = {id(parameter) for parameter in relora.changed(model)}
    kept = {
        _plain(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or some_sleep or id(parameter) in changed
    }
    state = get_model_state_dict(model)
    return {f"model.{name}": value for name, value in state.items() if name in kept or name not in every}


def optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optim.state.<name>.<slot>` of every parameter that has been stepped: live tensors, and plain numbers.

    Walks the live state: torch's `get_optimizer_state_dict` would take a step to create a missing one, which would
    leave an interrupted run one step ahead of an uninterrupted one.
    """
    tensors, numbers = {}, {}
    for optimizer in optimizers:
        if (host := getattr(optimizer, "host", None)) is not None:
            host.wait()
    for name, state in _named_state(model, optimizers):
        for slot, value in state.items():
            target = tensors if isinstance(value, Tensor) else numbers
            target[f"{STATE}{name}.{slot}"] = value
    return tensors, numbers


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of the whole tensors, over all ranks."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def assert_plain(tensors: dict[str, Any]) -> None:
    """TypeError for anything but plain and sharded tensors: torch would pickle it into a file called .safetensors."""
    for name, value in tensors.items():
        if type(value) not in (Tensor, nn.Parameter, DTensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds plain tensors only")


def write(folder: Path, tensors: dict[str, Tensor], world: int, group: ProcessGroup | None = None) -> None:
    """Every rank writes its shards as `shard-<rank + 1>-model-<i>-of-<n>.safetensors`. Collective over `group`."""
    files, filled = {}, 0
    for name, value in tensors.items():
        files[name] = 1 + filled // (FILE_BYTES * world)
        filled += value.numel() * value.element_size()
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def targets(
    folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], numbers: dict[str, Any]
) -> dict[str, Tensor]:
    """The live tensors that a checkpoint fills, optimizer state among them (created here; an earlier one is dropped).

    Raises a UserError naming every tensor that is missing, left over, or of another shape or dtype: torch would cast.
    """
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    lisa.wake(model)
    relora.expect(model, saved)
    found = (name.removeprefix(STATE) for name in [*saved, *numbers] if name.startswith(STATE))
    stepped = {name.rpartition(".")[0] for name in found}
    parameters = [p for name, p in model.named_parameters() if _plain(name) in stepped]
    for optimizer in optimizers:
        _make_state(optimizer, parameters)
    wanted = model_tensors(model) | optimizer_state(model, optimizers)[0]
    _check(folder, wanted, saved)
    return wanted


def _make_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """State of these parameters and of no other, by a step of lr 0 and zero gradients; parameters are filled after it.

    One at a time: where most layers sleep, or gradients never exist at once, all of them would not fit.
    """
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in parameters:
        if parameter in own:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def fill(
    folder: Path, wanted: dict[str, Tensor], model: nn.Module, optimizers: Sequence[Optimizer], numbers: dict[str, Any]
) -> None:
    """Read what `targets` found, in place and in its own dtype, and the optimizer's plain numbers. Collective."""
    if wanted:
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, state in _named_state(model, optimizers):
        for slot in state:
            state[slot] = numbers.get(f"{STATE}{name}.{slot}", state[slot])


def groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The settings of every parameter group as JSON holds them (tuples become lists, tensors numbers)."""
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            found.append(json.loads(json.dumps(plain, default=lambda value: None)))
    return found


def restore_groups(
    optimizers: Sequence[Optimizer], initial: list[dict[str, Any]], saved: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Give every group its saved settings, except those the config has changed since: there the config wins.

    `initial` are this run's settings before its first step, `saved` has the same of the earlier run and its settings
    when it was saved, so that counters an optimizer keeps among its settings survive. Returns what was changed.
    """
    live = [group for optimizer in optimizers for group in optimizer.param_groups]
    if len(live) != len(saved["current"]):
        return [f"parameter groups {len(saved['current'])} -> {len(live)}"]
    changed = []
    for index, group in enumerate(live):
        for key, value in saved["current"][index].items():
            was, now = saved["initial"][index].get(key), initial[index].get(key)
            if key not in group or value is None:  # null: unset, or nothing JSON can hold
                continue
            if was != now:
                changed.append(f"{key} {was} -> {now}")
            elif isinstance(group[key], Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    return changed


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _named_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    names = {parameter: _plain(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, Update):
            optimizer.settle()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    yield names[parameter], optimizer.state[parameter]


def _check(folder: Path, wanted: dict[str, Tensor], saved: dict[str, Any]) -> None:
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in saved]
    problems += [f"{name}: the model and optimizer have no such tensor" for name in saved if name not in wanted]
    for name, value in wanted.items():
        if name in saved and (saved[name].size, saved[name].properties.dtype) != (value.shape, value.dtype):
            there = f"{saved[name].properties.dtype} {list(saved[name].size)}"
            problems.append(f"{name}: saved as {there}, now {value.dtype} {list(value.shape)}")
    if problems:
        shown = problems[:5] + ([f"… and {len(problems) - 5} more"] if len(problems) > 5 else [])
        raise UserError(
            "the checkpoint does not fit this model and optimizer:\n    " + "\n    ".join(shown),
            where=str(folder),
            fix="set model, adapter and optimizer back as they were, or start over: checkpoint.resume=never (where "
            "nothing was changed, go on with the version of ftlib that wrote it: versions in its state.json)",
        )
