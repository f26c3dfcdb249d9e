"""Schedules, clipping and parameter groups."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftlib import loop, optim
from ftlib.optim.schedule import learning_rate
from ftlib.sections import Optim, Schedule
from ftlib.sections.optim import Group


def rates(steps, **kw):
    return [learning_rate(Schedule(**kw), 1.0, step, steps) for step in range(1, steps + 1)]


def test_warmup_rises_linearly_to_the_peak_then_cosine_reaches_its_floor():
    r = rates(100, name="cosine", warmup_steps=10, min_ratio=0.1)
    assert r[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert r[54] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert r[-1] == pytest.approx(0.1) and r == sorted(r[:10]) + sorted(r[10:], reverse=True)


def test_linear_and_constant():
    assert rates(100, name="linear", warmup_steps=0)[49] == pytest.approx(0.5)
    assert set(rates(50, name="constant", warmup_steps=5)[5:]) == {1.0}


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_short_runs_reach_the_peak_early_and_never_train_at_zero(steps):
    r = rates(steps, name="constant", warmup_steps=1000)
    assert max(r) == 1.0 and min(r) > 0


def test_a_warmup_that_leaves_no_step_is_warned_of_when_a_run_is_planned():
    planned = lambda warmup, steps: loop.check(SimpleNamespace(steps=steps, schedule=Schedule(warmup_steps=warmup)))  # noqa: E731
    for warmup, steps in ((100, 50), (50, 50)):
        with pytest.warns(UserWarning, match=rf"schedule\.warmup_steps is {warmup} and steps {steps}, .* to 5 steps"):
            planned(warmup, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(49, 50), planned(100, None), planned(Schedule().warmup_steps, 8)  # the last is nobody's wish


def test_clip_scales_to_the_norm_and_reports_the_norm_before():
    p = nn.Parameter(torch.zeros(2, 2))
    plain = torch.optim.SGD([p], lr=1.0)
    for grad, norm, moved in ((3.0, 6.0, 0.5), (0.1, 0.2, 0.1)):
        p.grad = torch.full((2, 2), grad)
        before = p.detach().clone()
        assert float(optim.step(plain, 1.0)) == pytest.approx(norm)
        torch.testing.assert_close(before - p.detach(), torch.full((2, 2), moved))


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_of_narrow_gradients_is_wide(fused):
    """bfloat16 knows 3 digits: 227.03 would be 227 or 226, and what is clipped to 1 up to 0.6 % off."""
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16)) for _ in range(9)]
    optimizer = torch.optim.AdamW(ps, lr=1.0, betas=(0.0, 0.0), eps=1e3, weight_decay=0.0, fused=fused)
    grads = [torch.randn(64, 8).bfloat16() for _ in ps]
    exact = torch.cat([g.flatten() for g in grads]).double().norm()
    for p, grad in zip(ps, grads, strict=True):
        p.grad = grad.clone()
    norm = optim.step(optimizer, 0.5)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    moved = torch.cat([p.detach().flatten() for p in ps]).double().norm()  # by the clipped gradient over eps
    torch.testing.assert_close(moved * 1e3, torch.tensor(0.5).double(), rtol=1e-3, atol=0)


def test_vectors_are_not_decayed_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    groups = optim.build(model, Optim(weight_decay=0.5)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (1, 0.0)]


def test_step_equals_torch_adamw_by_hand():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.load_state_dict(a.state_dict())
    cfg = Optim(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=0.5)
    ours = optim.build(a, cfg)
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(8, 4)
        a(x).square().sum().backward()
        b(x).square().sum().backward()
        optim.step(ours, cfg.max_grad_norm)
        nn.utils.clip_grad_norm_(b.parameters(), 0.5)
        theirs.step(), theirs.zero_grad()
    assert torch.equal(a.weight, b.weight)


def test_a_rate_is_of_a_group():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = optim.build(model, Optim(lr=1.0, groups=(Group(match="0.weight", lr_scale=0.5),)))
    assert optim.set_rate(optimizer, 0.2) == 0.2
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.1, 0.2]
