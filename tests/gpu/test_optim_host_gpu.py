"""Optimizer state in pinned host memory on a GPU: the same bits, less memory, whatever its streams do meanwhile."""

import pytest
import torch
from faults.tiny_training import Loader, one_process
from torch import nn

from ftlib import optim
from ftlib.checkpoint import Saver, State
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


def fresh(settings, offload):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)))
    return State(model, optim.build(model, Optim(lr=1e-3, weight_decay=0.1, offload=offload, **settings)), Loader())


def train(state, first, last):
    for step in range(first, last):
        generator = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(64, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)
        state.model(x).float().square().mean().backward()
        optim.step(state.optimizer, None)


def same(one, other):
    for state in (one, other):
        if state.optimizer.__dict__.get("host") is not None:
            state.optimizer.host.wait()
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for slot, value in one.optimizer.state[a].items():
            found, wanted = torch.as_tensor(value).cpu(), torch.as_tensor(other.optimizer.state[b][slot]).cpu()
            assert torch.equal(found, wanted), slot


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_bits_are_those_of_state_on_the_gpu(settings, tmp_path):
    here, there = fresh(settings, False), fresh(settings, True)
    for state in (here, there):
        train(state, 0, 6)
    Saver(Checkpoint(every=1), tmp_path, one_process(), {}).save(6, there)
    for state in (here, there):
        train(state, 6, 12)
    same(there, here)
    slots = [x for kept in there.optimizer.state.values() for x in kept.values() if getattr(x, "ndim", 0)]
    assert all(x.device.type == "cpu" and x.is_pinned() for x in slots)
    again = fresh(settings, True)
    assert Saver(Checkpoint(every=1), tmp_path, one_process(), {}, say=lambda text: None).resume(again) == 6
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
    assert used[False][1] - used[True][1] > 0.95 * (LAYERS - 3) * each - 2 * each
