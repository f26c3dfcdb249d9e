"""Advantages, policy losses, divergences and their denominators against values worked out by hand."""

import itertools

import pytest
import torch

from ftlib.losses import policy
from ftlib.losses.policy import Objective, Tokens, policy_loss, token_weights
from ftlib.rl.advantages import Scores, advantages, flat_groups, whiten_tokens

F64 = torch.float64
NAN = float("nan")


def scores(*columns, weights=None, group=4, lengths=None):
    rewards = torch.tensor(columns, dtype=F64).T
    count = len(rewards)
    return Scores(
        rewards,
        torch.tensor(weights or [1.0] * rewards.shape[1], dtype=F64),
        torch.arange(count) // group,
        torch.tensor(lengths or [1] * count),
    )


FIRST, SECOND = [1, 0, 0, 1, 0, 0, 0, 1], [0.5, 0.5, 0, 0, 1, 0, 0, 1]
GOLDEN = {
    "group": [0.865875, -0.865875, -0.865875, 0.865875, -0.4999, -0.4999, -0.4999, 1.4997],
    "center": [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75],
    "loo": [2 / 3, -2 / 3, -2 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, 1],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_advantages_of_one_reward(kind):
    assert advantages(scores(FIRST), kind).tolist() == pytest.approx(GOLDEN[kind], abs=1e-6)


def test_whitened_advantages():
    each = [advantages(scores(FIRST[at : at + 4]), "center_whiten") for at in (0, 4)]
    assert each[0].tolist() == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)
    assert each[1].tolist() == pytest.approx([-0.4999, -0.4999, -0.4999, 1.4997], abs=1e-6)
    both = advantages(scores(FIRST), "center_whiten").tolist()
    assert both == pytest.approx([0.9998, -0.9998, -0.9998, 0.9998, -0.4999, -0.4999, -0.4999, 1.4997], abs=1e-6)
    plain = advantages(scores(FIRST), "whiten")
    assert float(plain.mean()) == pytest.approx(0, abs=1e-12) and float(plain.std()) == pytest.approx(1, abs=1e-3)
    long = advantages(scores([1, 0, 0, 1], lengths=[3, 1, 1, 1]), "whiten")  # a token counts once
    assert float((long * torch.tensor([3, 1, 1, 1])).sum()) == pytest.approx(0, abs=1e-12)


def test_gdpo_normalises_each_reward_before_they_meet():
    both = scores(FIRST, SECOND, weights=[1, 0.5])
    wanted = [1.131019, -0.377093, -1.131019, 0.377093, -0.058315, -0.812371, -0.812371, 1.683057]
    assert advantages(both, "gdpo").tolist() == pytest.approx(wanted, abs=1e-6)
    summed = [1.050034, -0.63002, -1.050034, 0.63002, 0, -0.707007, -0.707007, 1.414014]
    assert advantages(both, "group").tolist() == pytest.approx(summed, abs=1e-6)


@pytest.mark.parametrize("kind", ["group", "center", "loo", "batch", "center_whiten", "maxrl", "opo", "gdpo"])
def test_equal_rewards_and_missing_ones_give_no_advantage(kind):
    flat = scores([1, 1, 1, 1, NAN, NAN, NAN, NAN])
    assert advantages(flat, kind).abs().max() < 1e-9
    assert flat_groups(flat, kind).all()
    some = advantages(scores([1, NAN, 0, 1, 0, 0, 1, 1]), kind)
    assert some[1] == 0 and some.isfinite().all() and some[0] > 0 > some[2]


def test_a_missing_reward_takes_no_part_in_the_mean():
    assert advantages(scores([1, NAN, 0, NAN]), "center").tolist() == [0.5, 0, -0.5, 0]
    two = scores([1, 0, NAN, NAN], [NAN, 1, 3, NAN], weights=[1, 2])
    assert two.total.tolist()[:3] == [1, 2, 6] and two.total[3].isnan()


def test_tokens_earn_what_is_still_to_come_of_the_penalty():
    found = whiten_tokens(torch.tensor([1.0, 0.0], dtype=F64), [torch.tensor([1.0, 2.0]), torch.tensor([0.5])], 0.1)
    raw = torch.tensor([1 - 0.3, 1 - 0.2, -0.05], dtype=F64)
    assert torch.cat(found).tolist() == pytest.approx(((raw - raw.mean()) / (raw.std() + 1e-4)).tolist())


# Two completions of three and two tokens.
NEW, OLD = torch.tensor([-0.5, -1, -2, -0.7, -0.2], dtype=F64), torch.tensor([-1, -1, -1.5, -0.3, -0.6], dtype=F64)
REF = torch.tensor([-0.6, -0.9, -2.5, -0.5, -0.3], dtype=F64)
ADVANTAGES, SEQUENCE = torch.tensor([1, 1, 1, -0.5, -0.5], dtype=F64), torch.tensor([0, 0, 0, 1, 1])
LENGTHS = torch.tensor([3, 2])
WAYS = ("token", "seq", "const")


def tokens(how, **changes):
    weights = token_weights(LENGTHS, torch.tensor([0, 1]), how, 4)[SEQUENCE]
    return Tokens(SEQUENCE, 2, weights, ADVANTAGES, **{"engine": OLD, "old": OLD} | changes)


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (Objective(), (-0.348124, -0.194610, -0.217577)),
        (Objective(ratio="sequence"), (-0.4, -0.25, -0.25)),
        (Objective(loss="cispo", ratio_cap=1.28), (0.498090, 0.384857, 0.311306)),
    ],
)
def test_losses(objective, wanted):
    found = [float(policy_loss(NEW, tokens(how), objective)[0]) for how in WAYS]
    assert found == pytest.approx(wanted, abs=1e-6)


def test_divergences():
    values = {"k1": policy.k1(NEW, REF), "k2": policy.k1(NEW, REF).square() / 2, "k3": policy.k3(NEW, REF)}
    wanted = {"k1": (0.08, 0.058333, 0.05), "k2": (0.032, 0.02875, 0.02), "k3": (0.028556, 0.025983, 0.017847)}
    for name, value in values.items():
        found = [float((tokens(how).weights * value).sum()) for how in WAYS]
        assert found == pytest.approx(wanted[name], abs=1e-6)


def test_a_group_counts_as_much_as_another():
    weights = token_weights(torch.tensor([3, 1, 4, 0]), torch.tensor([7, 7, 9, 9]), "group", 4)
    assert weights.tolist() == [1 / 8, 1 / 8, 1 / 8, 0]
    assert token_weights(torch.tensor([3, 0]), torch.tensor([0, 0]), "seq", 4).tolist() == [1 / 3, 0]


@pytest.mark.parametrize("loss", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradients_are_those_of_the_loss(loss, ratio):
    objective = Objective(loss=loss, ratio=ratio, kl_coef=0.1, clip_low=0.3, clip_high=0.6, ratio_cap=1.2)
    new = NEW.clone().requires_grad_()
    old = NEW + torch.tensor([0.1, -0.2, 0.05, 0.1, -0.3], dtype=F64)
    held = policy_loss(NEW, tokens("token", old=old, ref=REF), Objective(kl_coef=0.0))[1]

    def held_constant(new):
        """What stands behind a stop-gradient stays at the point of the derivative."""
        per = (new - old).clamp(-20, 20)
        if ratio == "sequence":
            per = policy.sequence_mean(per, SEQUENCE, 2)[SEQUENCE]
        at = policy.sequence_mean(NEW - old, SEQUENCE, 2)[SEQUENCE] if ratio == "sequence" else NEW - old
        trust = held["trust"]
        terms = {
            "clip": -torch.minimum(per.exp() * ADVANTAGES, per.exp().clamp(0.7, 1.6) * ADVANTAGES),
            "cispo": -at.exp().clamp(max=1.2) * ADVANTAGES * new,
            "reinforce": -ADVANTAGES * new,
        }
        penalty = 0.1 * (NEW - old).exp() * trust * (new - REF).square() / 2
        return (tokens("token").weights * (trust * terms[loss] + penalty)).sum()

    policy_loss(new, tokens("token", old=old, ref=REF), objective)[0].backward()
    for i in range(5):
        step = torch.zeros(5, dtype=F64)
        step[i] = 1e-6
        slope = (held_constant(NEW + step) - held_constant(NEW - step)) / 2e-6
        assert float(new.grad[i]) == pytest.approx(float(slope), abs=1e-8)


def test_on_policy_the_clipped_loss_has_reinforce_s_gradient():
    grads = []
    for loss in ("clip", "reinforce", "cispo"):
        new = NEW.clone().requires_grad_()
        policy_loss(new, tokens("token", old=None, engine=NEW), Objective(loss=loss))[0].backward()
        grads.append(new.grad)
    assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])


def test_a_distant_token_gives_no_infinite_loss():
    new = (NEW + torch.tensor([0, 0, 0, 500.0, 0])).requires_grad_()
    loss, logs = policy_loss(new, tokens("token", ref=REF), Objective(kl_coef=0.1))
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all() and logs["kl"].isfinite().all()
    dual = policy_loss(NEW + 3, tokens("token"), Objective(dual_clip=3.0))[0]
    assert float(dual) == pytest.approx((3 * -1.28 + 2 * 1.5) / 5)


def test_correction_weighs_by_what_the_engine_got_wrong():
    log_ratio = torch.tensor([0.0, 0.5, 2.0, -2.0])
    assert policy.correction(log_ratio, "truncate", 2.0).tolist() == pytest.approx([1, 1.648721, 2, 0.135335], abs=1e-6)
    assert policy.correction(log_ratio, "mask", 2.0).tolist() == pytest.approx([1, 1.648721, 0, 0], abs=1e-6)
    assert policy.correction(log_ratio, "none", 2.0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_penalty_s_gradient_is_that_of_the_divergence(off_policy):
    """A distribution over two tokens of three, enumerated: no sampling, so any bias shows."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, generator=draw, dtype=F64, requires_grad=True)
    ref, other = (torch.randn(4, 3, generator=draw, dtype=F64).log_softmax(-1) for _ in range(2))
    logp = logits.log_softmax(-1)
    sampler = other if off_policy else logp.detach()
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(-1).sum(), logits, retain_graph=True)[0]
    estimate = 0.0
    for state, token in itertools.product(range(4), range(3)):  # weighted by how often the sampler draws each token
        new, reference, drawn = logp[state, token][None], ref[state, token][None], sampler[state, token][None]
        ratio = (new.detach() - drawn).exp()
        estimate = estimate + drawn.exp() * policy.kl_penalty(new, reference, ratio)
    found = torch.autograd.grad(estimate.sum(), logits, retain_graph=True)[0]
    assert torch.allclose(found, exact, atol=1e-12)
    pairs = list(itertools.product(range(4), range(3)))
    usual = sum(sampler[pair].exp() * policy.k3(logp[pair], ref[pair]) for pair in pairs)
    assert not torch.allclose(torch.autograd.grad(usual, logits)[0], exact, atol=1e-2)  # what most libraries ship


@pytest.mark.parametrize("how", ["token", "seq", "const", "group"])
def test_any_split_gives_the_same_gradient(how):
    lengths = torch.tensor([1, 9, 2, 5])
    weights = token_weights(lengths, torch.tensor([0, 0, 1, 1]), how, 16)
    draw = torch.Generator().manual_seed(0)
    total = int(lengths.sum())
    new, old = (torch.randn(total, generator=draw, dtype=F64).sub(2) for _ in range(2))
    adv, sequence = torch.randn(4, generator=draw, dtype=F64), torch.arange(4).repeat_interleave(lengths)

    def gradient(*parts):
        x = new.clone().requires_grad_()
        for part in parts:
            at = torch.isin(sequence, torch.tensor(part))
            names = {s: i for i, s in enumerate(part)}
            own = torch.tensor([names[int(s)] for s in sequence[at]])
            some = Tokens(own, len(part), weights[sequence[at]], adv[sequence[at]], old[at], old[at])
            policy_loss(x[at], some, Objective(ratio="sequence"))[0].backward()
        return x.grad

    assert torch.allclose(gradient([0, 1, 2, 3]), gradient([3], [1, 0], [2]), atol=1e-15)
