"""Optimizers where their formulas have corners: stacks, tiny weights, falling rates, no gradient, turned matrices."""

import pytest
import torch
from test_optimizers import LR, STEPS
from torch import nn

from ftlib import optim
from ftlib.optim import schedule_free
from ftlib.sections import Optim
from ftlib.sections.optim import Group


def draw(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def holder(**tensors):
    """A module of parameters by name."""
    model = nn.Module()
    for name, value in tensors.items():
        model.register_parameter(name, nn.Parameter(value.clone()))
    return model


def moved(model, grads, **settings):
    """The model after a step for each dict of gradients, at its `lr` if it has one, and the optimizer."""
    optimizer = optim.build(model, Optim(**{"lr": LR, **settings}))
    for each in grads:
        optim.set_rate(optimizer, each.get("lr", LR))
        for name, p in model.named_parameters():
            p.grad = each[name].to(p.dtype, copy=True)
        optim.step(optimizer, None)
    return model, optimizer


def test_a_stack_of_many_small_matrices_is_its_matrices_to_muon():
    """The step's length is of a matrix, not of how many there are."""
    start, grads = draw(0, 9, 3, 2), [draw(1 + t, 9, 3, 2) for t in range(3)]
    stack = moved(holder(w=start), [{"w": g} for g in grads], name="muon")[0].w
    for i in range(9):
        alone = moved(holder(w=start[i]), [{"w": g[i]} for g in grads], name="muon")[0].w
        torch.testing.assert_close(stack[i], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-2])
def test_adafactor_s_steps_have_a_least_length(size):
    """A fresh adapter's B is 0 and has to leave it: lengths below 1e-3 count as that (eps 2 of the paper)."""
    start = size * draw(0, 6, 4)
    grads = [draw(1 + t, 6, 4) for t in range(STEPS)]
    ours, _ = moved(holder(w=start), [{"w": g} for g in grads], name="adafactor")
    theirs = nn.Parameter(start.clone())
    peer = torch.optim.Adafactor([theirs], lr=LR, eps=(1e-15, 1e-3), weight_decay=0.0)
    for grad in grads:
        theirs.grad = grad.clone()
        peer.step()
    torch.testing.assert_close(ours.w, theirs, rtol=1e-9, atol=1e-12)
    assert (ours.w - start).norm() > 0


def test_a_rate_that_falls_weighs_the_average_by_the_highest_so_far():
    """As the authors' code has it (lr_max); steps after a run goes on at a lower rate count as much as those before."""
    rates = [0.01, 0.02, 0.02, 0.005, 0.005, 0.001]
    start, optimizer = holder(w=draw(0, 3, 4)), None
    optimizer = optim.build(start, Optim(name="schedule_free", lr=LR))
    total = weights = peak = 0.0
    for t, rate in enumerate(rates):
        optim.set_rate(optimizer, rate)
        start.w.grad = draw(1 + t, 3, 4)
        optim.step(optimizer, None)
        peak = max(peak, rate)
        total, weights = total + peak**2 * optimizer.state[start.w]["z"], weights + peak**2
    schedule_free.finish(optimizer)
    torch.testing.assert_close(start.w.detach(), total / weights, rtol=1e-9, atol=1e-12)


def test_the_average_of_narrow_weights_is_rounded_once():
    """x lies beyond y by a ninth of its way from z: of the wide y, not of the parameter, which is y rounded."""
    model = holder(w=draw(0, 40, 50).bfloat16())
    optimizer = optim.build(model, Optim(name="schedule_free", lr=LR))
    total = 0.0
    for t in range(STEPS):
        model.w.grad = draw(1 + t, 40, 50).bfloat16()
        optim.step(optimizer, None)
        total = total + optimizer.state[model.w]["z"].double()
    with schedule_free.averaged(optimizer):
        same = (model.w == (total / STEPS).bfloat16()).double().mean()
    assert same > 0.99


def test_dion_waits_for_a_gradient():
    """The first step of an adapter's A has none, as B is 0."""
    still, grad = torch.zeros(6, 4, dtype=torch.float64), draw(1, 6, 4)
    model, optimizer = moved(holder(w=draw(0, 6, 4)), [{"w": still}, {"w": grad}], name="dion")
    assert all(value.isfinite().all() for value in optimizer.state[model.w].values())
    assert model.w.isfinite().all() and not torch.equal(model.w.detach(), draw(0, 6, 4))


def test_mup_goes_by_a_matrix_s_inputs_and_leaves_embeddings_alone():
    class Turned(nn.Linear):
        """Kept as [inputs, outputs]."""

        transposed = True

    model = nn.Sequential(nn.Embedding(8, 256), nn.Linear(256, 128), nn.Linear(128, 256), Turned(128, 512))
    found = optim.build(model, Optim(lr=1.0, mup_width=64)).param_groups
    scales = {id(p): group["lr"] for group in found for p in group["params"]}
    assert [scales[id(layer.weight)] for layer in model] == [1.0, 0.25, 0.5, 0.125]
    assert scales[id(model[1].bias)] == 1.0


def test_a_group_s_scale_multiplies_that_of_the_module():
    """LoRA+ makes B faster than A, and a group both of one layer slower."""
    model = nn.Module()
    model.near, model.far = holder(a=draw(0, 2, 3), b=draw(1, 3, 2)), holder(a=draw(2, 2, 3), b=draw(3, 3, 2))
    for layer in (model.near, model.far):
        layer.lr_scales = {"b": 8.0}
    found = optim.build(model, Optim(lr=1.0, groups=(Group(match="near", lr_scale=0.5),))).param_groups
    scales = {id(p): group["lr_scale"] for group in found for p in group["params"]}
    assert {name: scales[id(p)] for name, p in model.named_parameters()} == {
        "near.a": 0.5, "near.b": 4.0, "far.a": 1.0, "far.b": 8.0,
    }  # fmt: skip
