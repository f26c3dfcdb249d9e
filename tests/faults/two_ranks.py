"""What two processes do in tests/unit/test_checkpoint.py: `python two_ranks.py RANK STORE OUT`."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from faults.tiny_training import CPU, Loader, train_step
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ftlib.checkpoint import Saver, State, StopFlag, exchange, stop_agreed
from ftlib.launch import leave_group
from ftlib.sections import Checkpoint


def network(sharded, frozen=False):
    """Odd sizes, so that shards are uneven; a 0-sized shard and a persistent buffer too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 7), nn.Linear(7, 1), nn.Linear(1, 16))
    model.register_buffer("scale", torch.arange(3.0))
    if frozen:
        model[0].requires_grad_(False)
    if sharded:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return State(model, torch.optim.AdamW(trained, lr=1e-2), Loader(), {"tokens": 0})


def whole(state):
    """Every tensor of model and optimizer, gathered."""
    found = {}
    for name, parameter in state.model.named_parameters():
        found[f"model.{name}"] = full(parameter)
        for slot, value in state.optimizer.state.get(parameter, {}).items():
            found[f"optim.state.{name}.{slot}"] = full(value)
    return found


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def saver(out, run, **cfg):
    return Saver(Checkpoint(every=1, **cfg), out, run, {"seed": 0})


def round_trip(run, out, sharded, frozen):
    """Train, save, go on; resume into a fresh model and go on: both ways must give the same numbers."""
    state = network(sharded, frozen)
    torch.manual_seed(run.rank)
    saver(out, run).resume(state)
    for _ in range(3):
        train_step(state)
    saver(out, run).save(3, state)
    tensors = whole(state)
    if run.is_main:
        save_file(tensors, out / "whole.safetensors")
    ahead = [[*train_step(state), torch.rand(()).item()] for _ in range(2)]
    again = network(sharded, frozen)
    done = saver(out, run).resume(again)
    back = [[*train_step(again), torch.rand(()).item()] for _ in range(2)]
    return {"done": done, "same": ahead == back, "random": ahead[-1][-1], "position": again.loader.position}


def one_rank_fails(run, out):
    """An exception of rank 1 alone, in each phase that ranks go through separately."""
    state, messages = network(True), []
    train_step(state)
    fsync, calls = os.fsync, 0
    for kind in (OSError(28, "No space left on device"), RuntimeError("broken")):
        for nth in range(2):
            calls = 0

            def broken(handle, kind=kind, nth=nth):
                nonlocal calls
                calls += 1
                if run.rank == 1 and calls == nth + 1:
                    raise kind
                fsync(handle)

            os.fsync = broken
            try:
                saver(out, run).save(1, state)
                messages.append("no error")
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
            os.fsync = fsync
    saver(out, run).save(1, state)
    return messages


def in_background(run, out):
    """The same bytes as a save that is waited for; a failure of rank 1 alone raises on both after the same step."""
    state, found = network(True), {}
    train_step(state)
    for background in (False, True):
        folder = out / f"background_{background}"
        one = saver(folder, run, background=background)
        one.save(1, state)
        one.wait()
        shards = (folder / "checkpoints/step_000001").glob("shard-*")
        found[background] = {path.name: {k: v.tolist() for k, v in load_file(path).items()} for path in shards}
    fsync, error = os.fsync, OSError(28, "No space left on device")
    os.fsync = lambda handle: fail(error) if run.rank == 1 else fsync(handle)
    one.save(2, state)
    for step in range(3, 10**6):
        try:
            one.due(step, 10**7)
        except Exception as error:
            os.fsync = fsync
            return {"same": found[True] == found[False], "step": step, "error": f"{type(error).__name__}: {error}"}
        time.sleep(0.01)


def fail(error):
    raise error


def main(rank, store, out):
    run = SimpleNamespace(rank=rank, world=2, device=CPU, is_main=rank == 0)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    report = {
        "exchange": exchange(run, {"rank": rank, "text": "ä" * (1 + 1000 * rank)}),
        "failures": one_rank_fails(run, out / "failures"),
    }
    report["background"] = in_background(run, out)
    for name, sharded, frozen in (("sharded", True, False), ("plain", False, False), ("adapter", True, True)):
        (out / name).mkdir(exist_ok=True)
        report[name] = round_trip(run, out / name, sharded, frozen)
    flag = StopFlag()
    report["stop"] = [stop_agreed(run, flag)]
    flag.requested = rank == 1
    report["stop"].append(stop_agreed(run, flag))
    (out / f"report_{rank}.json").write_text(json.dumps(report))
    leave_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
