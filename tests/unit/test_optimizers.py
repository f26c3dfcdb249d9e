"""Every optimizer against its paper's recurrence, written down again here in float64, and against torch's own."""

import math
import warnings
from itertools import product

import pytest
import torch
from faults.tiny_training import Loader, one_process
from torch import nn

from ftlib import optim
from ftlib.checkpoint import Saver, State
from ftlib.errors import UserError
from ftlib.optim import adamw, schedule_free
from ftlib.optim.elementwise import slow_terms
from ftlib.optim.muon import COEFFICIENTS, newton_schulz
from ftlib.sections import Checkpoint, Optim, Schedule
from ftlib.sections.optim import Group

LR, DECAY, STEPS = 0.02, 0.1, 8
NAMES = ("adamw", "muon", "dion", "lion", "adafactor", "ademamix", "schedule_free")


class Net(nn.Module):
    """One parameter of each kind: an embedding, tall, wide and stacked matrices, a vector, a head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 4)
        self.tall, self.wide = nn.Linear(4, 10), nn.Linear(10, 4, bias=False)
        self.stack = nn.Parameter(torch.empty(3, 4, 6))
        self.lm_head = nn.Linear(4, 7, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.to(dtype)


def gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def trained(name, rates=None, **settings):
    """Parameters by name after STEPS steps of ours, and the optimizer."""
    model = Net()
    optimizer = optim.build(model, Optim(name=name, lr=LR, weight_decay=DECAY, **settings))
    for step in range(STEPS):
        gradients(model, step)
        optim.set_rate(optimizer, LR if rates is None else rates[step])
        optim.step(optimizer, None)
    return model, optimizer


def recurrence(update, **start):
    """The same parameters moved by `update(w, g, t, decay, state)`, a paper's recurrence for one tensor (t from 1)."""
    model, wanted = Net(), {}
    every = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: {} for name in every}
    for step in range(STEPS):
        gradients(model, step)
        for name, p in model.named_parameters():
            decay = DECAY if p.ndim >= 2 else 0.0
            every[name] = wanted[name] = update(name, every[name], p.grad, step + 1, decay, states[name])
    return wanted


def check(model, wanted, names=None):
    for name, p in model.named_parameters():
        if names is None or name in names:
            torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-9, atol=1e-11, msg=name)


def orthogonal_factor(g):
    """What Newton-Schulz gives, by its action on singular values: U f(f(f(f(f(S))))) V^T."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ v


def adamw_rule(_, w, g, t, decay, state):
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g * g
    return w - LR * (m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay * w)


def test_adamw():
    check(trained("adamw")[0], recurrence(adamw_rule))


def test_muon_on_matrices_and_adamw_on_the_rest():
    def rule(name, w, g, t, decay, state):
        if name not in ("tall.weight", "wide.weight", "stack"):
            return adamw_rule(name, w, g, t, decay, state)
        b = state["b"] = 0.95 * state.get("b", 0) + g
        step = 0.2 * math.sqrt(max(w.shape[-2:])) * orthogonal_factor(g + 0.95 * b)
        return w - LR * (step + decay * w)

    check(trained("muon")[0], recurrence(rule))


def test_muon_is_torch_muon_up_to_its_bfloat16():
    weights = Net(torch.float32).tall.weight.detach()
    ours, theirs = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    model = nn.Sequential()
    model.register_parameter("w", ours)
    mine = optim.build(model, Optim(name="muon", lr=LR, weight_decay=DECAY))
    peer = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        g = torch.randn(10, 4, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = g.clone(), g.clone()
        optim.step(mine, None), peer.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - weights).norm()


def test_newton_schulz_flattens_singular_values():
    x = torch.randn(2, 30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=1e-9, atol=1e-12)


def test_dion():
    def rule(name, w, g, t, decay, state):
        if name not in ("tall.weight", "wide.weight"):
            return adamw_rule(name, w, g, t, decay, state)
        rank = 2  # half of 4
        if not state:
            start = torch.randn(w.shape[1], rank, generator=torch.Generator().manual_seed(rank))
            state |= {"q": (start / start.norm(dim=0)).double(), "m": torch.zeros_like(w)}
        b = state["m"] + g
        p, _ = torch.linalg.qr(b @ state["q"])
        r = b.T @ p
        state["m"] = b - (1 - 0.9) * p @ r.T
        state["q"] = r / r.norm(dim=0)
        return (1 - LR * decay) * w - LR * math.sqrt(w.shape[0] / w.shape[1]) * p @ state["q"].T

    check(trained("dion", momentum=0.9, rank_fraction=0.5)[0], recurrence(rule))


def test_lion():
    def rule(_, w, g, t, decay, state):
        m = state.get("m", torch.zeros_like(w))
        state["m"] = 0.95 * m + 0.05 * g
        return w - LR * (torch.sign(0.9 * m + 0.1 * g) + decay * w)

    check(trained("lion")[0], recurrence(rule))


def test_ademamix_with_its_warm_up():
    def rule(_, w, g, t, decay, state):
        alpha = min(t * 5.0 / 6, 5.0)
        lb, l3 = math.log(0.9), math.log(0.999)
        beta3 = min(math.exp(lb * l3 / ((1 - t / 6) * l3 + t / 6 * lb)), 0.999) if t < 6 else 0.999
        m1 = state["m1"] = 0.9 * state.get("m1", 0) + 0.1 * g
        m2 = state["m2"] = beta3 * state.get("m2", 0) + (1 - beta3) * g
        v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g * g
        spread = (v / (1 - 0.95**t)).sqrt() + 1e-8
        return w - LR * ((m1 / (1 - 0.9**t) + alpha * m2) / spread + decay * w)

    check(trained("ademamix", alpha=5.0, beta3=0.999, slow_warmup=6)[0], recurrence(rule))
    half_life = [math.log(0.5) / math.log(slow_terms(t, 100, 1.0, 0.9999, 0.9)[1]) for t in (0, 50, 100)]
    assert half_life[1] == pytest.approx((half_life[0] + half_life[2]) / 2)  # linear in the half-life


def test_schedule_free_keeps_three_sequences():
    rates = [LR * min(1, t / 3) for t in range(1, STEPS + 1)]

    def rule(_, w, g, t, decay, state):
        z, x = state.get("z", w), state.get("x", w)
        v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g * g
        state["z"] = z - rates[t - 1] * (g / ((v / (1 - 0.95**t)).sqrt() + 1e-8) + decay * w)
        share = rates[t - 1] ** 2 / sum(rate**2 for rate in rates[:t])
        state["x"] = (1 - share) * x + share * state["z"]
        last[_] = state["x"]
        return 0.1 * state["z"] + 0.9 * state["x"]

    last = {}
    wanted = recurrence(rule)
    model, optimizer = trained("schedule_free", rates)
    check(model, wanted)
    before = [p.detach().clone() for p in model.parameters()]
    with schedule_free.averaged(optimizer):
        check(model, last)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    schedule_free.finish(optimizer)
    check(model, last)


@pytest.mark.parametrize("name", ["schedule_free", "ademamix"])
def test_weights_in_bfloat16_learn_nearly_as_in_float32(name):
    """A noisy regression that begins 0.01 from its answer; slow sequences in bfloat16 end up farther off."""

    def away(dtype):
        draws = torch.Generator().manual_seed(0)
        start = 0.02 * torch.randn(32, 32, generator=draws)
        wanted = start + 0.01 * torch.randn(32, 32, generator=draws)
        model = torch.nn.Linear(32, 32, bias=False)
        model.weight = torch.nn.Parameter(start.to(dtype))
        optimizer = optim.build(model, Optim(name=name, lr=2e-4, weight_decay=0.0, max_grad_norm=None))
        for _ in range(1500):
            noise = 0.02 * torch.randn(32, 32, generator=draws)
            model.weight.grad = (model.weight.detach().float() - wanted + noise).to(dtype)
            optim.step(optimizer, None)
        schedule_free.finish(optimizer)
        return (model.weight.detach().float() - wanted).square().mean().sqrt().item()

    wide, narrow = away(torch.float32), away(torch.bfloat16)
    assert wide < 0.003 and narrow < 0.004, (wide, narrow)


def test_adafactor_is_torch_adafactor():
    model, theirs = trained("adafactor")[0], Net()
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    peer = torch.optim.Adafactor(groups, lr=LR, eps=(1e-15, 1e-3))
    for step in range(STEPS):
        gradients(theirs, step)
        peer.step()
    check(model, dict(theirs.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_to_the_bit(name, dtype, tmp_path):
    run = one_process()

    def fresh():
        model = Net(dtype)
        return State(model, optim.build(model, Optim(name=name, lr=LR, weight_decay=DECAY)), Loader())

    def go(state, first, last):
        for step in range(first, last):
            gradients(state.model, step)
            optim.set_rate(state.optimizer, LR * (step + 1) / 10)
            optim.step(state.optimizer, 1.0)

    whole, again = fresh(), fresh()
    go(whole, 0, 3)
    saver = Saver(Checkpoint(every=1), tmp_path, run, {"seed": 0})
    saver.save(3, whole)
    go(whole, 3, 6)
    assert Saver(Checkpoint(every=1), tmp_path / "copy", run, {"seed": 0}).resume(fresh()) == 0
    assert Saver(Checkpoint(every=1), tmp_path, run, {"seed": 0}, say=lambda text: None).resume(again) == 3
    go(again, 3, 6)
    schedule_free.finish(whole.optimizer), schedule_free.finish(again.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def groups_of(model, **settings):
    return optim.build(model, Optim(lr=1.0, **settings)).param_groups


def test_groups_by_pattern_the_first_that_matches_counts():
    asked = (Group(match="tall", lr_scale=0.5, weight_decay=0.3), Group(match="weight", lr_scale=2.0))
    model = Net()
    found = groups_of(model, groups=asked, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    table = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in found for p in g["params"]}
    assert table == {
        "embed_tokens.weight": (2.0, 0.1), "tall.weight": (0.5, 0.3), "tall.bias": (0.5, 0.3),
        "wide.weight": (2.0, 0.1), "lm_head.weight": (2.0, 0.1), "stack": (1.0, 0.1),
    }  # fmt: skip
    assert {g["lr_scale"] for g in found} == {0.5, 1.0, 2.0}


def test_a_group_that_matches_nothing_is_named():
    with pytest.raises(UserError, match=r"optim.groups\[1\].match"):
        groups_of(Net(), groups=(Group(match="tall"), Group(match="tail")))


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"momentum": 0.9}, "momentum: is for muon, dion"),
        ({"name": "muon", "rank_fraction": 0.5}, "rank_fraction: is for dion"),
        ({"name": "dion", "rank_fraction": 1.5}, "is not in"),
        ({"mup_width": 0}, "mup_width"),
    ],
)
def test_a_setting_of_another_optimizer_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Optim(**settings)


def changes(width, **settings):
    """How far the output of a deep linear stack moves in its first Adam step, by width."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, width), *(nn.Linear(width, width, bias=False) for _ in range(3)))
    for layer in model[1:]:
        nn.init.normal_(layer.weight, 0, width**-0.5)
    optimizer = optim.build(model, Optim(lr=1e-2, **settings))
    tokens = torch.arange(8)
    before = model(tokens).detach()
    (model(tokens) * torch.randn(8, width)).sum().backward()
    optim.step(optimizer, None)
    return (model(tokens) - before).square().mean().sqrt().item()


def test_mup_makes_steps_alike_at_every_width():
    """The coordinate check of Tensor Programs V: without it, the wider the model the further an output moves."""
    plain = [changes(width) for width in (64, 256)]
    scaled = [changes(width, mup_width=64) for width in (64, 256)]
    assert scaled[0] == pytest.approx(plain[0])
    assert plain[1] > 2.5 * plain[0]
    assert scaled[1] < 1.5 * scaled[0]


def test_a_decay_under_schedule_free_learning_is_refused():
    schedule_free.check(Optim(name="schedule_free"), Schedule(name="constant"))
    schedule_free.check(Optim(), Schedule())
    with pytest.raises(UserError, match="averages in place of a decay"):
        schedule_free.check(Optim(name="schedule_free"), Schedule())


def test_slots_are_what_is_kept_for_a_matrix():
    for name in NAMES:
        model = Net(torch.float32)
        optimizer = optim.build(model, Optim(name=name, lr=LR))
        gradients(model, 0)
        optim.step(optimizer, None)
        p = model.wide.weight
        kept = sum(value.numel() for value in optimizer.state[p].values() if isinstance(value, torch.Tensor))
        assert kept // p.numel() == Optim(name=name).slots, name


def test_bytes_are_those_of_a_matrix_in_either_width():
    for name, dtype in product(NAMES, (torch.float32, torch.bfloat16)):
        model = Net(dtype)
        optimizer = optim.build(model, Optim(name=name, lr=LR))
        gradients(model, 0)
        optim.step(optimizer, None)
        p = model.wide.weight
        held = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.numel() >= p.numel()]
        kept = sum(t.numel() * t.element_size() for t in held) / p.numel()
        assert kept == Optim(name=name).state_bytes(p.element_size()), name


def test_a_second_moment_that_cannot_decay_is_warned_of():
    model = Net(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"optim\.betas.*forgets nothing with 0\.999.*optim\.states=fp32"):
        adamw.check(model, Optim(betas=(0.9, 0.999)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cfg in (Optim(), Optim(betas=(0.9, 0.999), states="fp32"), Optim(name="schedule_free", betas=(0.9, 0.999))):
            adamw.check(model, cfg)
        adamw.check(Net(torch.float32), Optim(betas=(0.9, 0.999)))


def test_frozen_and_gradientless_parameters_stay():
    for name in NAMES:
        model = Net()
        model.wide.requires_grad_(False)
        start = model.wide.weight.clone()
        optimizer = optim.build(model, Optim(name=name, lr=LR))
        model.tall.weight.grad = torch.ones_like(model.tall.weight)
        optim.step(optimizer, None)
        assert torch.equal(model.wide.weight, start) and model.tall.weight.grad is None
        assert len(optimizer.state) == 1, name


def test_a_gradient_that_is_not_finite_moves_nothing():
    for name in NAMES:
        model = Net()
        optimizer, start = optim.build(model, Optim(name=name, lr=LR)), model.tall.weight.clone()
        gradients(model, 0)
        model.stack.grad[0, 0, 0] = math.nan
        optim.step(optimizer, 1.0)
        assert torch.equal(model.tall.weight, start), name


