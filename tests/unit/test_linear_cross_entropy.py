"""The fused head against all logits at once, in float64 and in every split."""

import pytest
import torch

from ftlib.kernels import linear_cross_entropy as module
from ftlib.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ftlib.kernels.linear_logprobs import linear_logprobs


def inputs(dtype=torch.float64, tokens=37, dim=16, vocab=53, ignored=0.3):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients(monkeypatch, tile, dtype, tolerance):
    monkeypatch.setattr(module, "TILE_BYTES", tile * 53 * dtype.itemsize)
    monkeypatch.setattr(module, "TRAINED", 1)
    hidden, weight, labels = inputs(dtype)
    loss = linear_cross_entropy(hidden, weight, labels) / 11
    got = torch.autograd.grad(loss, (hidden, weight))
    oracle = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy_reference(*oracle, labels) / 11
    want = torch.autograd.grad(expected, oracle)
    assert abs(loss - expected) <= tolerance * abs(expected)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradcheck():
    hidden, weight, labels = inputs(tokens=5, dim=3, vocab=7)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels), (hidden, weight))


def test_rows_without_a_target_have_no_gradient_and_no_targets_give_zero():
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.all(hidden.grad[labels == -100] == 0) and torch.all((hidden.grad != 0).any(1)[labels != -100])
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0
    loss.backward()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("function", [linear_cross_entropy, lambda *args: -linear_logprobs(*args).sum()])
@pytest.mark.parametrize("part", [0, 1], ids=["below the head", "the head"])
def test_a_mean_is_not_rounded_before_it_scales_gradients(function, part):
    """In bfloat16 1 / 20011 is 0.2 % off, the same way for every gradient."""
    torch.manual_seed(0)
    given = torch.randn(256, 64).bfloat16(), (torch.randn(512, 64) * 0.1).bfloat16()
    of, labels = given[part].requires_grad_(), torch.randint(512, (256,))
    (whole,) = torch.autograd.grad(function(*given, labels), of)
    for count in (12345, 20011, 49345):
        (mean,) = torch.autograd.grad(function(*given, labels) / count, of)
        wanted, found = (whole.double() / count).flatten(), mean.double().flatten()
        assert (found @ wanted / (wanted @ wanted)).item() == pytest.approx(1, abs=5e-4)
