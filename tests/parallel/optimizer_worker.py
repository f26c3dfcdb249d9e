"""One of the processes of test_sharded_optimizers.py: `optimizer_worker.py RANK WORLD FOLDER JSON_MESHES`."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ftlib import optim
from ftlib.checkpoint import Saver, State
from ftlib.launch import leave_group
from ftlib.sections import Checkpoint, Optim

torch.set_num_threads(1)
NAMES = ("adamw", "muon", "dion", "lion", "adafactor", "ademamix", "schedule_free")
LOW = {
    "fp32": {}, "int8": {}, "fp8": {}, "int4": {}, "int8 stochastic": {"rounding": "stochastic"},
}  # fmt: skip
SHAPES = {
    "even": (8, 6), "more": (8, 6), "third": (8, 6), "odd": (7, 10), "tiny": (1, 5), "stack": (3, 4, 5), "vector": (5,),
    "gate_up": (3, 2, 4, 5),
}  # fmt: skip


def model(place):
    """Matrices of equal and of uneven shapes, one with fewer rows than processes, stacks and a vector."""
    generator, made = torch.Generator().manual_seed(0), nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, nn.Parameter(place(torch.randn(shape, generator=generator).double())))
    return made


def train(name, place, offload=False):
    made = model(place)
    optimizer = optim.build(made, Optim(name=name, lr=0.05, weight_decay=0.1, offload=offload))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in made.parameters():
            p.grad = place(torch.randn(p.shape, generator=generator).double())
        optim.step(optimizer, 1.0)
    return {name: whole(p.detach()) for name, p in made.named_parameters()}


def train_low(states, place, steps=4):
    """A model in bfloat16 with a matrix whose blocks no shard cuts, and its optimizer."""
    generator, made = torch.Generator().manual_seed(0), nn.Module()
    for name, shape in {"large": (9, 512), "vector": (5,)}.items():
        start = torch.randn(shape, generator=generator).bfloat16()
        made.register_parameter(name, nn.Parameter(place(start)))
    optimizer = optim.build(made, Optim(lr=0.05, weight_decay=0.1, states=states.split()[0], **LOW[states]))
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in made.parameters():
            p.grad = place(torch.randn(p.shape, generator=generator).bfloat16())
        optim.step(optimizer, None)
    return State(made, optimizer, SimpleNamespace(state_dict=dict, load_state_dict=lambda saved: None))


def held(state):
    """Weights and the moments of the matrix, whole."""
    kept = {name: value for name, value in state.optimizer.state[state.model.large].items() if name != "step"}
    return {name: whole(p.detach()) for name, p in [*state.model.named_parameters(), *kept.items()]}


def train_in_backward(mesh, rank, offload=False):
    """Layers that FSDP2 shards, moved as their gradients arrive; each process has half of the rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    if mesh is not None:
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizer, norms = optim.build(net, Optim(lr=0.01, weight_decay=0.1, in_backward=True, offload=offload)), []
    for step in range(4):
        x = torch.randn(8, 512, generator=torch.Generator().manual_seed(step)).double()
        (net(x if mesh is None else x.chunk(2)[rank]).square().sum() / 8).backward()
        assert all(p.grad is None for p in net.parameters())
        norms.append(optim.step(optimizer, None))
    return {name: whole(p.detach()) for name, p in net.named_parameters()} | {"norms": torch.stack(norms)}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def placements(kind, mesh, ndim):
    if kind == "fsdp":
        return [Shard(0)]
    if kind == "hsdp":
        return [Replicate(), Shard(0)]
    return [Shard(0), Shard(1) if ndim > 1 else Replicate()]


def cut_twice(x, mesh):
    """Rows shared by tensor parallelism, and those of each process by FSDP2: no plain shards of the whole."""
    held = nn.Module()
    held.register_parameter("x", nn.Parameter(distribute_tensor(x, mesh["b"], [Shard(0)])))
    fully_shard(held, mesh=mesh["a"])
    return held.x.detach()


def placing(kind, mesh):
    if kind == "rows_twice":
        return lambda x: cut_twice(x, mesh)
    return lambda x: distribute_tensor(x, mesh, placements(kind, mesh, x.ndim))


def main(rank, world, folder, meshes):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    report = {}
    for kind in meshes:
        shape = (world,) if kind == "fsdp" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
        place = placing(kind, mesh)
        for name in NAMES:
            alone, spread = train(name, lambda x: x), train(name, place)
            report[f"{kind} {name}"] = max(float((spread[key] - alone[key]).abs().max()) for key in alone)
            print(kind, name, report[f"{kind} {name}"], flush=True)
        alone, away = train("adamw", lambda x: x), train("adamw", place, offload=True)
        report[f"{kind} from host memory"] = max(float((away[key] - alone[key]).abs().max()) for key in alone)
        for states in LOW:
            if kind == "fsdp_tp" and LOW[states]:
                continue  # a part of some columns has noise of its own
            alone = held(train_low(states, lambda x: x))
            state = train_low(states, place)
            if states == "int4" and kind == "fsdp":  # for one process to go on from
                run = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"), is_main=rank == 0)
                Saver(Checkpoint(every=1), folder / "run", run, {}).save(4, state)
            spread = held(state)
            same = alone.keys() == spread.keys() and all(torch.equal(spread[key], alone[key]) for key in alone)
            report[f"{kind} {states}"] = 0.0 if same else 1.0
            print(kind, states, same, flush=True)
    if meshes == ["fsdp"]:
        alone, spread = train_in_backward(None, rank), train_in_backward(mesh, rank)
        report["in backward"] = max(float((spread[key] - alone[key]).abs().max()) for key in alone)
        away = train_in_backward(mesh, rank, offload=True)
        report["from host memory"] = max(float((away[key] - spread[key]).abs().max()) for key in alone)
    (folder / f"report_{rank}.json").write_text(json.dumps(report))
    leave_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
