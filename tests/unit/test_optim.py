"""Schedules, clipping and parameter groups."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from ftlib import loop, optim
from ftlib.optim import schedule
from ftlib.optim.schedule import learning_rate
from ftlib.sections import Checkpoint, Eval, Optim, Schedule
from ftlib.sections.optim import Group
from ftlib.sections.rl import Greedy
from ftlib.sections.steps import in_steps, shares


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


@pytest.mark.parametrize("decay", [None, 40, 0.25, 90])
def test_wsd_is_transformers(decay):
    """Warm-up, plateau and end alike; where less than the decay is left, it begins after the warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    last = min(in_steps(decay or 0.1, 100), 80)
    options = {"num_warmup_steps": 20, "num_decay_steps": last, "num_training_steps": 100, "decay_type": "linear"}
    theirs = get_wsd_schedule(optimizer, **options, min_lr_ratio=0.1).lr_lambdas[0]
    ours = rates(100, name="wsd", warmup_steps=0.2, decay_steps=decay, min_ratio=0.1)
    assert ours[20:] == pytest.approx([theirs(step) for step in range(21, 101)])
    assert ours[19] == 1.0 and ours[-1] == pytest.approx(0.1) and ours.count(1.0) == 81 - last
    theirs = get_wsd_schedule(optimizer, **options).lr_lambdas[0]  # whose warm-up begins at the floor
    plain = rates(100, name="wsd", warmup_steps=0.2, decay_steps=decay)
    assert plain[:20] == pytest.approx([theirs(step) for step in range(1, 21)])


@pytest.mark.parametrize("warmup", [0, 0.2])
def test_inverse_sqrt_is_transformers(warmup):
    theirs = get_inverse_sqrt_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(()))]), in_steps(warmup, 100))
    ours = rates(100, name="inverse_sqrt", warmup_steps=warmup)
    assert ours == pytest.approx([theirs.lr_lambdas[0](step) for step in range(1, 101)])
    assert min(rates(100, name="inverse_sqrt", warmup_steps=1, min_ratio=0.3)[1:]) == 0.3


def test_a_decay_of_its_own_is_for_wsd_and_has_to_fit():
    for wrong, match in (
        ({"decay_steps": 5}, "is for wsd; cosine has none"), ({"name": "wsd", "decay_steps": 1.5}, "is neither"),
        ({"name": "wsd", "decay_steps": 0}, "name=constant"),
        ({"name": "wsd", "decay_steps": 0.6, "warmup_steps": 0.5}, "more than the whole run"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"decay_steps: .*{match}"):
            Schedule(**wrong)
    with pytest.warns(UserWarning, match=r"schedule\.decay_steps is 95 and the warm-up leaves 90 of 100 steps"):
        schedule.check(Schedule(name="wsd", decay_steps=95), 100)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_short_runs_reach_the_peak_early_and_never_train_at_zero(steps):
    r = rates(steps, name="constant", warmup_steps=1000)
    assert max(r) == 1.0 and min(r) > 0


def test_a_warmup_that_somebody_asked_for_is_as_long_as_they_said():
    assert rates(8, name="constant", warmup_steps=5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(45, name="constant")[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]), "a tenth, as nobody asked"
    cfg = SimpleNamespace(schedule=Schedule())
    assert shares(cfg, 45) == ["of 45 steps: schedule.warmup_steps 20 is 4"] and shares(cfg, 200) == []
    assert shares(SimpleNamespace(schedule=Schedule(warmup_steps=5)), 8) == []


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_run_of_one_step_trains(name):
    assert rates(1, name=name) == [1.0] and rates(2, name=name, warmup_steps=0)[0] > 0


def test_a_warmup_that_leaves_no_step_is_warned_of_when_a_run_is_planned():
    planned = lambda warmup, steps: loop.check(SimpleNamespace(steps=steps, schedule=Schedule(warmup_steps=warmup)))  # noqa: E731
    for warmup, steps in ((100, 50), (50, 50)):
        with pytest.warns(UserWarning, match=rf"schedule\.warmup_steps is {warmup} and steps {steps}, .* to 5 steps"):
            planned(warmup, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(49, 50), planned(100, None), planned(Schedule().warmup_steps, 8)  # the last is nobody's wish


def test_shares_of_a_run_are_rounded_and_at_least_a_step():
    given = {0.03: 9, 0.001: 1, 0.5: 150, 1e-9: 1, 0.07: 21, 20: 20, 0: 0}
    assert {share: in_steps(share, 300) for share in given} == given
    assert rates(10, name="constant", warmup_steps=0.5)[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], "and not cut to a tenth"
    for section, key in ((Schedule, "warmup_steps"), (Eval, "every"), (Checkpoint, "every"), (Greedy, "every")):
        section(**{key: 0.03}), section(**{key: 3}), section(**{key: 0})
        for wrong in (1.5, -0.1, 1.0, 20.0, -1, math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"{key}: {wrong} is neither a whole number .*20, or 0.*share .*0\.1"):
                section(**{key: wrong})


def test_clip_scales_to_the_norm_and_reports_the_norm_before():
    p = nn.Parameter(torch.zeros(2, 2))
    plain = torch.optim.SGD([p], lr=1.0)
    for grad, norm, moved in ((3.0, 6.0, 0.5), (0.1, 0.2, 0.1)):
        p.grad = torch.full((2, 2), grad)
        before = p.detach().clone()
        assert float(optim.step(plain, 1.0)) == pytest.approx(norm)
        torch.testing.assert_close(before - p.detach(), torch.full((2, 2), moved))


def test_a_step_that_learnt_from_nothing_moves_nothing():
    model = nn.Linear(2, 2)
    assert float(optim.step(optim.build(model, Optim()), 1.0)) == 0


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
