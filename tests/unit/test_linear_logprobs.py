"""Log-probabilities from the fused head against all logits at once: values, entropies, gradients, in every split."""

import pytest
import torch

from ftlib.kernels import linear_cross_entropy as tiling
from ftlib.kernels import linear_logprobs as module
from ftlib.kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference


def inputs(dtype=torch.float64, tokens=37, dim=16, vocab=53, ignored=0.3):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = -100
    return hidden, weight, labels, torch.randn(tokens, generator=g, dtype=dtype)


@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize(
    "terms",
    [{}, {"temperature": 0.7}, {"scale": 1.3, "softcap": 2.0, "temperature": 1.6}],
    ids=["plain", "warm", "capped"],
)
def test_values_and_gradients(monkeypatch, tile, frozen, terms):
    monkeypatch.setattr(tiling, "TILE_BYTES", tile * 53 * 8)
    monkeypatch.setattr(tiling, "TRAINED", 1)
    monkeypatch.setattr(module, "ENTROPY_BYTES", 5 * 53 * 4)
    *tensors, labels, slopes = inputs()
    if frozen != "nothing":
        tensors[frozen == "weight"].requires_grad_(False)
    trained = [t for t in tensors if t.requires_grad]
    logprobs, entropies = linear_logprobs(*tensors, labels, entropy=True, **terms)
    got = torch.autograd.grad(logprobs @ slopes, trained)
    wanted, spread = linear_logprobs_reference(*tensors, labels, **terms)
    expected = torch.autograd.grad(wanted @ slopes, trained)
    assert logprobs.shape == labels.shape and not entropies.requires_grad
    assert torch.all(logprobs[labels == -100] == 0)
    for ours, theirs in zip((logprobs, entropies, *got), (wanted, spread, *expected), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_gradcheck():
    hidden, weight, labels, _ = inputs(tokens=5, dim=3, vocab=7)
    for frozen in (False, True):
        weight = weight.detach().requires_grad_(not frozen)
        given = (hidden, weight)
        assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, labels, temperature=0.8), given)


def test_half_precision_gives_float32_sums():
    hidden, weight, labels, slopes = inputs(torch.bfloat16)
    logprobs = linear_logprobs(hidden, weight, labels, targets=int((labels != -100).sum()))
    assert logprobs.dtype == torch.float32
    wanted, _ = linear_logprobs_reference(hidden, weight, labels)
    assert (logprobs - wanted).abs().max() < 1e-5
    (logprobs @ slopes.float()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_nothing_is_kept_for_backward_that_will_not_come():
    hidden, weight, labels, _ = inputs()
    with torch.no_grad():
        assert linear_logprobs(hidden, weight, labels).grad_fn is None
    alone = linear_logprobs(hidden, weight, torch.full_like(labels, -100))
    assert alone.abs().max() == 0
    alone.sum().backward()
    assert hidden.grad.abs().max() == 0 == weight.grad.abs().max()


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(*inputs()[:3], temperature=0.0)
