"""Losses that weigh tokens, against their formulas over whole logits in float64 and autograd."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ftlib.kernels import linear_cross_entropy as kernel
from ftlib.losses.language_modelling import next_token_loss
from ftlib.losses.weighted import weighted_cross_entropy
from ftlib.models.noise import add_noise
from ftlib.observe.statistics import statistics
from ftlib.sections import Loss

N, D, V = 23, 8, 41


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, N, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, V, (1, N), generator=generator)
    labels[0, ::5] = -100
    return hidden, head, labels


def by_formula(hidden, head, labels, rule, own=None, scale=1.0, softcap=None):
    """All logits at once, weights detached, differentiated by autograd; `own` [1, N]: those that the data bring."""
    logits = scale * hidden[0] @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = labels[0] != -100
    logits, nll = logits[kept], F.cross_entropy(logits[kept], labels[0][kept], reduction="none")
    weight = torch.ones_like(nll)
    if rule.name == "dft":
        weight = logits.softmax(-1).gather(1, labels[0][kept][:, None])[:, 0].detach()
    if rule.name == "eaft":
        p = torch.sort(logits, descending=True).values[:, : rule.eaft_k].softmax(-1).detach()
        weight = (-(p * p.log()).sum(-1) / 3.0) ** rule.eaft_alpha
    each = weight * nll + rule.z_loss * torch.logsumexp(logits, -1).square()
    return each.sum() if own is None else (own[0][kept].double() * each).sum()


RULES = [
    Loss(name="dft"), Loss(name="eaft"), Loss(name="eaft", eaft_alpha=0.5, eaft_k=7), Loss(z_loss=0.01),
    Loss(name="eaft", eaft_k=100, z_loss=0.1),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("terms", [{}, {"scale": 0.3, "softcap": 2.0}], ids=["plain", "capped"])
def test_value_and_gradients_are_the_formulas(rule, terms, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_BYTES", V * 8 * 4)  # tiles of four rows
    monkeypatch.setattr(kernel, "TRAINED", 1)
    mine, wanted = inputs(), inputs()
    targets = int((mine[2] != -100).sum())
    ours = next_token_loss(*mine, targets, rule, **terms)
    theirs = by_formula(*wanted, rule, **terms)
    (2 * ours).backward(), (2 * theirs).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(mine[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [Loss(), *RULES], ids=str)
@pytest.mark.parametrize("count", [None, "known"])
def test_weights_of_tokens_scale_what_any_rule_makes_of_them(rule, count, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_BYTES", V * 8 * 4)
    monkeypatch.setattr(kernel, "TRAINED", 1)
    mine, wanted = inputs(), inputs()
    own = 3 * torch.rand(1, N, generator=torch.Generator().manual_seed(4))
    own[mine[2] == -100] = 7.0  # of no target: it must not count
    targets = None if count is None else int((mine[2] != -100).sum())
    ours = next_token_loss(*mine, targets, rule, own, scale=0.5, softcap=3.0)
    theirs = by_formula(*wanted, rule, own, scale=0.5, softcap=3.0)
    (2 * ours).backward(), (2 * theirs).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(mine[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [Loss(), Loss(name="dft", z_loss=0.01)], ids=str)
def test_a_half_everywhere_is_one_everywhere_and_zero_is_no_target(rule):
    """Of a mean: to the bit, in float32 and bfloat16, which halving does not round."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for half in (None, 0.5, 0.3):
            hidden, head, labels = (t.detach().to(dtype) if t.is_floating_point() else t for t in inputs())
            hidden.requires_grad_(), head.requires_grad_()
            own = None if half is None else torch.full(labels.shape, half)
            count = int((labels != -100).sum()) if half is None else float(own[labels != -100].double().sum())
            mean = next_token_loss(hidden, head, labels, None, rule, own) / count
            found.append((mean, *torch.autograd.grad(mean, (hidden, head))))
        plain, halves, thirds = found
        assert all(torch.equal(a, b) for a, b in zip(plain, halves, strict=True))
        for a, b in zip(plain, thirds, strict=True):
            close = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, rtol=close, atol=close * a.abs().max().item())
    hidden, head, labels = inputs()
    own = (torch.arange(N) % 3 > 0).float()[None]
    masked = torch.where(own > 0, labels, -100)
    for targets, weights in ((labels, own), (masked, None)):
        loss = next_token_loss(hidden, head, targets, None, rule, weights)
        found.append((loss, *torch.autograd.grad(loss, (hidden, head))))
    for a, b in zip(*found[-2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_a_rule_it_is_cross_entropy():
    hidden, head, labels = inputs()
    plain = next_token_loss(hidden, head, labels)
    assert weighted_cross_entropy(hidden[0], head, labels[0]).item() == pytest.approx(plain.item(), rel=1e-12)


def trained(rule):
    """Probabilities of a table of logits after some descent: certain and wrong, uncertain and wrong."""
    logits = torch.zeros(2, V, dtype=torch.float64)
    logits[0, 0] = 8.0  # certain that it is 0; both are told 1
    table, eye = logits.clone().requires_grad_(), torch.eye(2, dtype=torch.float64)
    for _ in range(20):
        loss = next_token_loss(eye[None], table.T, torch.tensor([[1, 1]]), 2, rule)
        (grad,) = torch.autograd.grad(loss, table)
        table = (table - 0.5 * grad).detach().requires_grad_()
    return table.softmax(-1)[:, 1].tolist()


def test_eaft_and_dft_leave_confident_conflicts_alone():
    plain, eaft, dft = (trained(Loss(name=name)) for name in ("cross_entropy", "eaft", "dft"))
    assert plain[0] > 0.3 and eaft[0] < 0.05 and dft[0] < 0.01  # the certain one
    assert eaft[1] > 0.5  # the uncertain one is learnt


def test_z_loss_pulls_the_normaliser_to_one():
    hidden, head, labels = inputs()
    before = torch.logsumexp(hidden[0] @ head.T, -1).abs().mean()
    shift = torch.zeros(D, dtype=torch.float64).requires_grad_()
    for _ in range(200):
        (grad,) = torch.autograd.grad(next_token_loss(hidden + shift, head, labels, rule=Loss(z_loss=1.0)), shift)
        shift = (shift - 1e-4 * grad).detach().requires_grad_()
    assert torch.logsumexp((hidden + shift)[0] @ head.T, -1).abs().mean() < before


class Embeds(torch.nn.Module):
    """What `add_noise` changes of a model."""

    def __init__(self):
        super().__init__()
        self.model = SimpleNamespace(embed=lambda batch: torch.zeros(*batch.layout.lengths.shape, 16))


def test_neftune_noise_is_uniform_and_shrinks_with_length():
    lengths = torch.cat([torch.full((1, 900), 900), torch.full((1, 100), 100)], 1)
    batch, model = SimpleNamespace(layout=SimpleNamespace(lengths=lengths)), Embeds()
    add_noise(model, 5.0)
    noise = model.model.embed(batch)[0]
    for part, length in ((noise[:900], 900), (noise[900:], 100)):
        reach = 5.0 / math.sqrt(length * 16)
        assert part.abs().max() <= reach and part.abs().max() > 0.98 * reach
        assert part.std() == pytest.approx(reach / math.sqrt(3), rel=0.05) and abs(part.mean()) < 0.05 * reach
    model.eval()
    assert not model.model.embed(batch).any()
    still = Embeds()
    add_noise(still, 0.0)
    assert not still.model.embed(batch).any()


def test_neftune_noise_is_that_of_transformers():
    """Its hook, from the authors' code, of rows that are one document each, from the same dice."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    batch = SimpleNamespace(layout=SimpleNamespace(lengths=torch.full((3, 40), 40)))
    ours, theirs = Embeds(), SimpleNamespace(training=True, neftune_noise_alpha=torch.tensor(7.0))
    add_noise(ours, 7.0)
    torch.manual_seed(1)
    found = ours.model.embed(batch)
    torch.manual_seed(1)
    wanted = neftune_post_forward_hook(theirs, None, torch.zeros(3, 40, 16))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_statistics_sum_up_to_the_whole_norm():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))})
    model["layers"][0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    found = statistics(model)
    assert set(found) == {f"{what}/layers.*.{p}" for what in ("grad_norm", "weight_norm") for p in ("weight", "bias")}
    weights = torch.cat([layer.weight.flatten() for layer in model["layers"]])
    assert found["weight_norm/layers.*.weight"] == pytest.approx(weights.norm().item())
    assert found["grad_norm/layers.*.bias"] == pytest.approx(model["layers"][1].bias.grad.norm().item())
