"""A profile's numbers against ones counted by hand: the table once could be wrong in any of its columns unseen."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftlib import optim
from ftlib.observe import profile
from ftlib.observe.profile import OUTSIDE, REST, STEPS, WARM, StepProfile, by_component, component, memory, table
from ftlib.sections import Optim

CPU = torch.autograd.DeviceType.CPU


def event(name, own, parent=None, kernels=(), device=CPU):
    """As torch's profiler has them: microseconds of its own, and of what it called too."""
    made = SimpleNamespace(name=name, cpu_parent=parent, device_type=device, self_cpu_time_total=own)
    made.cpu_time_total = 10 * own
    made.kernels = [SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels]
    return made


def events():
    """Of three steps."""
    engine = event("autograd::engine::evaluate_function: MmBackward0", 300.0)
    between = event(OUTSIDE, 9e6)
    step = event("Optimizer.step#AdamW.step", 600.0)
    return [
        engine,
        between,
        step,
        event("aten::mm", 3000.0, kernels=[("nvjet_tst", 30_000.0), ("splitKreduce", 3000.0)]),
        event("aten::mm", 6000.0, event("MmBackward0", 0.0, engine), kernels=[("nvjet_tst", 60_000.0)]),
        event("aten::mm", 7000.0, between, kernels=[("nvjet_tst", 70_000.0)]),
        event("aten::mul_", 900.0, step, kernels=[("vectorized_elementwise", 9000.0)]),
        event("aten::rsqrt", 1500.0, kernels=[("triton_red_fused", 12_000.0)]),
        event("triton_launch", 0.0, kernels=[("ncclDevKernel_AllGather", 1500.0)]),
        event("nvjet_tst", 1e6, device=torch.autograd.DeviceType.CUDA),
    ]


def test_milliseconds_of_a_step_by_component():
    assert by_component(events(), on_gpu=False) == {
        "matrix products": {"forward": 1.0, "backward": 2.0},
        "optimizer": {"forward": 0.5, "backward": 0.0},
        REST: {"forward": 0.5, "backward": 0.1},
    }


def test_on_a_gpu_those_of_its_kernels_whose_names_count():
    assert by_component(events(), on_gpu=True) == {
        "matrix products": {"forward": 11.0, "backward": 20.0},
        "optimizer": {"forward": 3.0, "backward": 0.0},
        "communication": {"forward": 0.5, "backward": 0.0},
        REST: {"forward": 4.0, "backward": 0.0},
    }


def test_the_first_component_whose_expression_is_found_anywhere():
    assert component(["aten::copy_", "aten::embedding", "autograd::engine", "x"]) == "embedding"
    assert component(["aten::mm", "flash_attn"]) == "attention"
    assert component(["aten::linalg_vector_norm", "c10d::allreduce_"]) == "communication"


def test_memory_counts_each_tensor_once():
    """Tied weights, a buffer, an optimizer with two slots for what trains; the rest of the peak is activations."""
    model = nn.ModuleDict({"embed": nn.Embedding(64, 1024), "body": nn.Linear(1024, 1024, bias=False)})
    model["head"] = nn.Linear(1024, 64, bias=False)
    model["head"].weight = model["embed"].weight.requires_grad_(False)
    model.register_buffer("codes", torch.zeros(1 << 20, dtype=torch.uint8))
    optimizer = torch.optim.AdamW([model["body"].weight])
    model["body"].weight.grad = torch.ones_like(model["body"].weight)
    optimizer.step()
    mib = {name: round(1024 * size, 2) for name, size in memory(model, optimizer, 20 << 20).items()}
    held = {"frozen weights": 1.25, "trained weights": 4.0, "gradients": 4.0, "optimizer state": 8.0}
    assert mib == held | {"activations and workspace": 2.75}
    assert memory(model, optimizer, 1 << 20)["activations and workspace"] == 0


def test_the_table_s_shares_are_of_the_step():
    times = {"norms": {"forward": 20.0, "backward": 0.0}, "products": {"forward": 10.0, "backward": 30.0}}
    held = {"frozen weights": 0.25, "gradients": 0.5}
    lines = table({"step_ms": 80.0, "time_ms": times, "memory_gib": held}, "GPU waits")
    assert lines[0] == "a step takes 80.0 ms"
    rows = [line.split() for line in lines[2:5]]
    assert rows == [
        ["products", "10.00", "30.00", "50.0%"],
        ["norms", "20.00", "0.00", "25.0%"],
        ["GPU", "waits", "20.00", "25.0%"],
    ]
    assert lines[5] == "memory, MiB:  frozen weights 256.00  gradients 512.00"
    times["products"]["forward"] = 90.0  # streams beside each other
    lines = table({"step_ms": 80.0, "time_ms": times, "memory_gib": held | {"gradients": 1.5}}, "GPU waits")
    assert lines[4].split() == ["GPU", "waits", "0.00", "0.0%"]
    assert lines[5] == "memory, GiB:  frozen weights 0.25  gradients 1.50"


def test_what_lies_between_steps_is_no_step_s_time(tmp_path, monkeypatch):
    """Steps of 2 s, and 5 s of evaluation behind each, by a clock that is moved by hand."""
    now, said = [100.0], []
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
    monkeypatch.setattr(profile, "time", clock)
    monkeypatch.setattr(profile, "by_component", lambda events, on_gpu: {})
    model = nn.Linear(2, 2)
    recorded = StepProfile(tmp_path, model, torch.optim.SGD(model.parameters()), said.append)
    for _ in itertools.repeat(None, WARM + STEPS):
        now[0] += 2.0
        with recorded:
            now[0] += 5.0
    assert said[0] == "a step takes 2,000.0 ms"


def test_gradients_that_never_exist_at_once_take_as_much_as_the_largest():
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 256, bias=False))
    for own, numbers in ((Optim(), 512 * 768), (Optim(in_backward=True, max_grad_norm=None), 512 * 512)):
        found = memory(model, optim.build(model, own), None)
        assert found["gradients"] == pytest.approx(4 * numbers / 2**30, rel=1e-3)
