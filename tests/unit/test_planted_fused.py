"""Faults that were planted in fused adapters and went unseen: on quantized weights a gate that only some of the four
passes know, sibling layers whose adapters differ in rank, and memory that lies otherwise than compiled code is told."""

import pytest
import torch

from ftlib.kernels.lora_linear import lora_project
from ftlib.quant import FORMATS
from ftlib.quant.fused import frozen_lora_project, stack

RANKS, OUTS, DIM = (3, 5), (96, 32), 128


def operands(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, DIM, generator=g).to(dtype).requires_grad_()
    weights = [torch.randn(out, DIM, generator=g) for out in OUTS]
    a = [torch.randn(rank, DIM, generator=g).requires_grad_() for rank in RANKS]
    b = [torch.randn(out, rank, generator=g).requires_grad_() for out, rank in zip(OUTS, RANKS, strict=True)]
    return x, weights, a, b


def plain(x, weights, a, b, scale):
    """Each layer by itself, each product by itself, in float64."""
    pairs = zip(weights, a, b, strict=True)
    return torch.cat([x @ w.double().T + scale * (x @ low.T) @ high.T for w, low, high in pairs], -1)


def gradients(y, leaves):
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum(), leaves)]


def close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= 1e-5 * max(1.0, theirs.norm().item())


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
@pytest.mark.parametrize("once", [False, True])
def test_quantized_siblings_of_two_ranks_behind_a_gate(once, gate):
    x, weights, a, b = operands()
    held = [FORMATS["int8"].quantize(weight) for weight in weights]
    parts = [part for each in held for part in each.values()]
    y = frozen_lora_project(x, parts, "int8", a, b, 1.5, None if gate is None else torch.tensor(gate), once)
    rounded = [FORMATS["int8"].dequantize(*each.values(), torch.float32) for each in held]
    wide = [t.detach().double().requires_grad_() for t in (x, *a, *b)]
    exact = plain(wide[0], rounded, wide[1:3], wide[3:], 1.5 * (1.0 if gate is None else gate))
    close(gradients(y, (x, *a, *b)), gradients(exact, wide))


@pytest.mark.parametrize("dim", [DIM, 16], ids=["narrow", "wide"])
def test_plain_siblings_of_two_ranks(dim):
    """Either branch: more channels in than out, and fewer."""
    x, weights, a, b = operands()
    x, weights, a = x[:, :dim], [w[:, :dim] for w in weights], [low[:, :dim] for low in a]
    leaves = [t.detach().clone().requires_grad_() for t in (x, *a, *b)]
    out, rank = sum(OUTS), sum(RANKS)
    stacked = torch.zeros(out + rank, dim + rank)
    stacked[:out, :dim] = torch.cat(weights)
    stacked[out:, :dim] = torch.cat(a).detach()
    stacked[: OUTS[0], dim : dim + RANKS[0]] = b[0].detach()
    stacked[OUTS[0] : out, dim + RANKS[0] :] = b[1].detach()
    y = lora_project(leaves[0], stacked, leaves[1:3], leaves[3:], 1.5)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    close(gradients(y, leaves), gradients(plain(wide[0], weights, wide[1:3], wide[3:], 1.5), wide))


def test_what_belongs_to_no_layer_is_zero_in_the_matrix_that_is_made(monkeypatch):
    """Memory that was used before is what it is made in."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(7.0))
    _, weights, a, b = operands()
    parts = [part for weight in weights for part in FORMATS["int8"].quantize(weight).values()]
    made = stack(parts, "int8", a, b, torch.float32)
    assert made[: OUTS[0], DIM + RANKS[0] :].count_nonzero() == 0 == made[OUTS[0] : sum(OUTS), DIM:-5].count_nonzero()
    assert made[sum(OUTS) :, DIM:].count_nonzero() == 0


@pytest.mark.parametrize("dim", [DIM, 16], ids=["narrow", "wide"])
def test_gradients_lie_as_compiled_code_expects(dim):
    """One is a part of a wider product, and keeps its strides: code that was compiled for others reads elsewhere."""
    out, rank = 40, 6
    operands = [torch.randn(7, width) for width in (out, dim, rank)]
    told = (*operands, torch.randn(out + rank, dim + rank), 1.5, None)
    torch.library.opcheck(torch.ops.ftlib.lora_project_backward.default, told, test_utils="test_faketensor")
