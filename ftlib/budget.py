"""`memory.budget_gib`: the fastest memory setting that fits, found by trial on the shape of the run's batches.

Settings stand on a ladder from fast to lean. An estimate (ftlib.preflight) says where to begin; a forward and backward
there is measured, and from what it took the next rung is tried, up or down, until the fastest that fits is known. What
it leaves unused is given to as many blocks as it lasts for: those keep more than the others. What was found lies in
`<output_dir>/memory.json`: a run that goes on takes it from there, and repeats the same bits.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ftlib import preflight
from ftlib.errors import Problems, UserError
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.balancing import Balance
from ftlib.losses.language_modelling import next_token_loss
from ftlib.losses.multi_token import multi_token_loss
from ftlib.models.remote import size
from ftlib.parallel import offload, recompute
from ftlib.parallel.run import Run
from ftlib.quant import qat
from ftlib.sections import Loss, Memory

SHARE = 0.92  # of the memory that is free, for `auto`: the allocator leaves gaps
COST = {"none": 0.0, "selective": 0.02, "except_attention": 0.25, "full": 0.3}  # of a step's time, about: bench/LOG.md
WAIT = 0.01  # that of parking what is kept in host memory
LEAST = 0.01  # of a step's time: what blocks that differ must gain
TRIES = 3  # at their number
TILE = 8192  # tokens; for rows of at least twice as many
FILE = "memory.json"


@dataclass(frozen=True)
class Rung:
    """A setting, and what a step under it is expected to take, in bytes."""

    memory: Memory
    estimate: int


def check(cfg: Any, world: int) -> None:
    """UserError where nothing can be measured, or a trial would not be what the run does."""
    if cfg.memory.budget_gib is None:
        return
    problems = (
        (not torch.cuda.is_available(), "a budget is measured on a GPU, and there is none here"),
        (world > 1, "a budget is measured by one process, and this run has several"),
        (not hasattr(cfg, "loss"), "the trial is a step of next-token training, and this recipe takes others"),
    )
    fix = "leave it out and set memory.recompute, memory.offload or memory.tiled_mlp; tune plan estimates them"
    found = [str(UserError(what, where="memory.budget_gib", fix=fix)) for wrong, what in problems if wrong]
    if found:
        raise Problems(found)


def settle(model: nn.Module, cfg: Any, run: Run) -> None:
    """Put the setting that `cfg.memory.budget_gib` asks for into a model with weights, and note it there."""
    path, asked = Path(cfg.output_dir) / FILE, question(cfg, run.device)
    if (known := _found(path))["asked"] == asked:
        put(model, Memory(**known["memory"]), run.device)
        model.memory_note = f"{known['note']}, as before ({path})"
        return
    rungs, extra = ladder(model, cfg), states(model, cfg)
    budget = room(cfg.memory.budget_gib, run.device)

    def measure(memory: Memory) -> int | None:
        put(model, memory, run.device)
        peak = trial(model, cfg, run.device)
        return None if peak is None else peak + extra

    at, peak = choose(rungs, measure, budget)
    memory, peak = mixed(rungs, at, peak, measure, budget, len(model.model.layers))
    put(model, memory, run.device)
    model.memory_note = f"memory: {words(memory)}: measured {size(peak)} of {size(budget)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"asked": asked, "memory": asdict(memory), "note": model.memory_note}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def words(memory: Memory) -> str:
    """A setting, for people."""
    found = [f"recompute {memory.recompute}", *["offload"] * memory.offload]
    if memory.recompute_layers:
        both = "both " if memory.offload else ""
        found.append(f"{both}in {memory.recompute_layers} blocks")
        found.append(f"recompute {memory.recompute_rest} in the rest")
    return ", ".join(found + [f"tiled_mlp {memory.tiled_mlp}"] * bool(memory.tiled_mlp))


def _found(path: Path) -> dict[str, Any]:
    """What an earlier start of the run noted; nothing where that cannot be read: it is measured again."""
    try:
        return {"asked": None, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return {"asked": None}


def note(model: nn.Module) -> list[str]:
    """What a run says about it."""
    return [model.memory_note] if hasattr(model, "memory_note") else []


def ladder(model: nn.Module, cfg: Any, shards: int = 1) -> list[Rung]:
    """From the fastest to the leanest, where `shards` processes share the weights."""
    changes = [{"recompute": name} for name in ("none", "selective", "except_attention")]
    changes += [{"recompute": name, "offload": True} for name in ("except_attention", "full")]
    dense = all(hasattr(getattr(block, "mlp", None), "tile") for block in model.model.layers)
    if dense and cfg.batch.micro_rows * cfg.data.seq_len >= 2 * TILE:
        changes.append({"recompute": "full", "offload": True, "tiled_mlp": TILE})
    plain = Memory(compile=cfg.memory.compile, cuda_graph=cfg.memory.cuda_graph)
    settings = [replace(plain, **change) for change in changes]
    return [Rung(memory, preflight.need(model, _with(cfg, memory), shards).about) for memory in settings]


def choose(rungs: Sequence[Rung], measure: Callable[[Memory], int | None], budget: int) -> tuple[int, int]:
    """(the fastest rung that fits, its bytes). `measure` gives what a setting takes; None: more than there is.

    No rung is measured twice. What one took beyond its estimate is expected of its neighbour too.
    """
    at = next((i for i, rung in enumerate(rungs) if rung.estimate <= budget), len(rungs) - 1)
    took: dict[int, int | None] = {}
    while True:
        peak = took[at] = measure(rungs[at].memory)
        if peak is not None and peak <= budget:
            above = at - 1
            if above < 0 or above in took or rungs[above].estimate + peak - rungs[at].estimate > budget:
                return at, peak
            at = above
        elif at + 1 in took:  # which fitted
            return at + 1, took[at + 1]
        elif at + 1 < len(rungs):
            at += 1
        else:
            raise UserError(
                f"the leanest setting takes {'more than there is' if peak is None else size(peak)}, "
                f"{size(budget)} are allowed",
                where="memory.budget_gib",
                fix="fewer batch.micro_rows, a shorter data.seq_len, model.quantize=nf4, or more memory",
            )


def mixed(
    rungs: Sequence[Rung], at: int, peak: int, measure: Callable[[Memory], int | None], budget: int, blocks: int
) -> tuple[Memory, int]:
    """(setting, its bytes): the rung `at`, which took `peak`, or a lean one for some blocks and a faster for the rest.

    Of all pairs the one that should be the fastest is tried, if it gains anything to speak of; of how many blocks keep
    more, estimates say where to begin, and what was measured how to go on.
    """
    best, off, found = (rungs[at].memory, peak), peak - rungs[at].estimate, []
    if rungs[at].memory.tiled_mlp:
        return best
    for lean in (rung for rung in rungs[at:] if not rung.memory.tiled_mlp):
        for fast in (rung for rung in rungs[:at] if rung.memory.recompute in ("none", "selective")):
            each = (fast.estimate - lean.estimate) / blocks
            if each > 0:
                count = min(max(math.ceil((fast.estimate + off - budget) / each), 1), blocks)
                setting = replace(lean.memory, recompute_layers=count, recompute_rest=fast.memory.recompute)
                found.append((cost(setting, blocks), each, setting))
    uniform = cost(best[0], blocks)
    _, each, setting = min(found, default=(1.0, 1.0, best[0]), key=lambda one: one[0])
    tried: set[int] = set()
    while (count := setting.recompute_layers) not in tried and len(tried) < TRIES:
        if not 0 < count < blocks or cost(setting, blocks) + LEAST > uniform:
            break
        tried.add(count)
        took = measure(setting)
        if took is not None and took <= budget:
            best = setting, took
            count -= int((budget - took) / each)
        else:
            count += (blocks - count + 1) // 2 if took is None else math.ceil((took - budget) / each)
        setting = replace(setting, recompute_layers=max(count, 1))
    return best


def cost(memory: Memory, blocks: int) -> float:
    """What a setting adds to a step's time, about, as a share of it."""
    lean = memory.lean(blocks)
    whole = lean * (COST[memory.recompute] + WAIT * memory.offload) + (blocks - lean) * COST[memory.recompute_rest]
    return whole / blocks


def put(model: nn.Module, memory: Memory, device: torch.device) -> None:
    """Give the model this setting in place of the one it has."""
    torch.compiler.reset()
    recompute.use(model, memory, device)
    offload.detach(model, device)
    if memory.offload:
        offload.attach(model, memory.recompute_layers)


def trial(model: nn.Module, cfg: Any, device: torch.device) -> int | None:
    """Peak bytes of forward and backward over a micro-batch of the run's shape, all of it targets; None: too many.

    The second of two counts: the first compiles, and finds no gradients where a run adds them up.
    """
    rows, length, found = cfg.batch.micro_rows, cfg.data.seq_len, None
    adds_up = cfg.batch.rows > rows
    torch.cuda.empty_cache()
    with torch.random.fork_rng(devices=[device]):
        try:
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats(device)
                ids = torch.randint(model.arch.vocab, (rows, length), device=device)
                ends = torch.arange(0, 2 * rows + 1, device=device, dtype=torch.int32) * length // 2
                positions = torch.arange(length, device=device).expand(rows, length)
                extent = torch.tensor([2 * rows, -(-length // 2)], dtype=torch.int32)
                layout = Layout.packed(ends.int(), length, (rows, length), extent)
                batch = Batch(ids, ids, positions, layout, ids.numel())
                learn(model, batch, cfg.loss)
                if not adds_up:
                    model.zero_grad(set_to_none=True)
            found = torch.cuda.max_memory_allocated(device)
        except torch.OutOfMemoryError:
            pass
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return found


def learn(model: nn.Module, batch: Batch, rule: Loss) -> None:
    """Forward and backward as the run will have them in the end: predicting further ahead, experts balanced, and
    rounded, where asked."""
    balance = Balance(model, rule)
    qat.switch(model, True)
    try:
        hidden, terms = model(batch), model.logit_terms
        loss = next_token_loss(hidden, model.lm_head.weight, batch.labels, batch.target_tokens, rule, **terms)
        loss = loss + multi_token_loss(model, hidden, batch, rule) + balance(batch)
        (loss / batch.target_tokens).backward()
    finally:
        qat.switch(model, False)  # a run says before each step whether it is


def room(asked: float | str, device: torch.device) -> int:
    """Bytes that may be used: those asked for, or most of what is free or already ours."""
    if asked != "auto":
        return int(asked * 2**30)
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE * (free + torch.cuda.memory_reserved(device)))


def states(model: nn.Module, cfg: Any) -> int:
    """Bytes of the optimizer's state on the device, which a trial does not have."""
    return preflight.need(model, cfg, 1).optimizer


def question(cfg: Any, device: torch.device) -> dict[str, str]:
    """What the answer depends on."""
    keys = ("model", "lora", "train", "lisa", "qat", "loss", "mtp", "optim", "memory", "dtype", "deterministic")
    keys += ("sizes", "context")  # of which model.path no longer tells
    found = {key: str(getattr(cfg, key)) for key in keys if hasattr(cfg, key)}
    found |= {"batch": str(cfg.batch), "seq_len": str(cfg.data.seq_len), "torch": torch.__version__}
    return found | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}


def _with(cfg: Any, memory: Memory) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(cfg), "memory": memory})
