"""Steps of our AdamW whose gradients may be clipped or not finite: judged on the device, while the host goes on."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftlib import optim
from ftlib.checkpoint.tensors import optimizer_state
from ftlib.errors import UserError
from ftlib.optim import adamw
from ftlib.sections import Optim


@pytest.mark.parametrize("states", ["int8", "fp8", "int4", "bf16", None])
def test_a_step_without_a_finite_norm_changes_nothing(states):
    """Nobody waits for the norm: the step is taken, changes nothing, and is not counted once somebody looks."""

    def trained(norms):
        torch.manual_seed(0)
        model = nn.Linear(64, 64).bfloat16()
        optimizer = optim.build(model, Optim(lr=0.1, states=states, rounding="stochastic"))
        for factor in norms:
            (model(torch.ones(2, 64).bfloat16()).square().sum() * factor).backward()
            assert optim.step(optimizer, 1.0).isfinite() == (abs(factor) < float("inf"))
        optimizer.settle()
        return [p.detach() for p in model.parameters()], list(optimizer.state.values())

    nan, inf = float("nan"), float("inf")
    (weights, states_), (exact, exact_states) = trained([nan, 1.0, inf, 1.0, nan]), trained([1.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(weights, exact, strict=True))
    for mine, theirs in zip(states_, exact_states, strict=True):
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"] == 2
        same = (torch.equal(mine[k].view(torch.uint8), theirs[k].view(torch.uint8)) for k in mine if k != "step")
        assert all(same)


def test_clipping_inside_the_step_is_clipping_before_it():
    moved = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = optim.build(model, Optim(lr=0.1, states="int8"))
        for _ in range(3):
            model(torch.ones(2, 64)).square().sum().backward()
            if not inside:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norm = optim.step(optimizer, 0.5 if inside else None)
            assert (norm > 1) == inside
        moved.append(model.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_counts_steps_that_were_taken():
    model = nn.Linear(64, 64)
    optimizer = optim.build(model, Optim(lr=0.1, states="int8"))
    for factor in (1.0, float("nan")):
        (model(torch.ones(2, 64)).square().sum() * factor).backward()
        optim.step(optimizer, None)
    numbers = optimizer_state(model, [optimizer])[1]
    assert {name: n for name, n in numbers.items() if name.endswith(".step")} == {
        "optim.state.weight.step": 1, "optim.state.bias.step": 1}  # fmt: skip


def test_states_that_would_all_be_wide_are_refused_and_some_are_told():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8, bias=False))
    assert adamw.note(model, Optim(states="int4")) == [
        "optimizer: states of 1 of 3 parameters in int4, of small ones in fp32"
    ]
    adamw.check(model, Optim(states="int4"))
    assert not adamw.note(model, Optim()) and not adamw.note(model[:1].requires_grad_(False), Optim(states="int8"))
    with pytest.raises(UserError, match="nothing would be kept in int8"):
        adamw.check(model[1], Optim(states="int8"))


class Reads(TorchDispatchMode):
    """Counts how often the host asks the device for a number."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_the_host_asks_for_nothing_behind_backward():
    """Before the next step's forward it may, as a run has read the loss by then."""
    model = nn.Linear(64, 64)
    optimizer = optim.build(model, Optim(lr=0.1, states="int8"))
    for _ in range(3):
        optim.set_rate(optimizer, 0.1)
        model(torch.ones(2, 64)).square().sum().backward()
        with Reads() as reads:
            optim.step(optimizer, 1.0)
        assert reads.count == 0
