"""Optimizer state in pinned host memory on a GPU: the same bits, less memory, whatever its streams do meanwhile."""

import pytest
import torch
import torch.distributed as dist
from faults.tiny_training import Loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ftlib import optim
from ftlib.checkpoint import Saver, State
from ftlib.optim.pieces import local
from ftlib.sections import Checkpoint, Optim

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WIDTH, LAYERS = 2048, 12
KINDS = [
    {},
    {"name": "lion"},
    {"states": "fp32"},
    {"states": "int8", "rounding": "stochastic"},
    {"max_grad_norm": None, "in_backward": True},
]


class Run:
    rank, world, is_main = 0, 1, True
    device = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def group():
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fresh(settings, offload, sharded=False):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)))
    if sharded:
        mesh = init_device_mesh("cuda", (1,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
    return State(model, optim.build(model, Optim(lr=1e-3, weight_decay=0.1, offload=offload, **settings)), Loader())


def train(state, first, last):
    for step in range(first, last):
        generator = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(64, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)
        state.model(x).float().square().mean().backward()
        optim.step(state.optimizer, None)


def same(one, other):
    torch.cuda.synchronize()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(local(a), local(b))
        for slot, value in one.optimizer.state[a].items():
            found, wanted = (local(torch.as_tensor(x)).cpu() for x in (value, other.optimizer.state[b][slot]))
            assert torch.equal(found, wanted), slot


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_bits_are_those_of_state_on_the_gpu(settings, sharded, tmp_path):
    """In a run, from a checkpoint that is written while it goes on, and after that one is read."""
    here, there = fresh(settings, False, sharded), fresh(settings, True, sharded)
    saver = Saver(Checkpoint(every=1), tmp_path, Run(), {})
    for state in (here, there):
        train(state, 0, 6)
    saver.save(6, there)
    for state in (here, there):
        train(state, 6, 12)
    saver.wait()
    same(there, here)
    slots = [x for kept in there.optimizer.state.values() for x in kept.values() if getattr(x, "ndim", 0)]
    assert slots and all(local(x).is_pinned() and isinstance(x, DTensor) == sharded for x in slots)
    again = fresh(settings, True, sharded)
    assert Saver(Checkpoint(every=1), tmp_path, Run(), {}, say=lambda text: None).resume(again) == 6
    train(again, 6, 12)
    same(again, here)


def test_state_is_not_on_the_gpu_between_steps_and_little_of_it_within():
    used = {}
    for offload in (False, True):
        state = fresh({"states": "fp32"}, offload)
        train(state, 0, 2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(state, 2, 4)
        torch.cuda.synchronize()
        used[offload] = before, torch.cuda.max_memory_allocated()
        del state
        torch.cuda.empty_cache()
    each = 8 * WIDTH * WIDTH  # bytes of one layer's moments
    assert used[False][0] - used[True][0] > 0.95 * LAYERS * each
    assert used[False][1] - used[True][1] > 0.95 * (LAYERS - 5) * each
