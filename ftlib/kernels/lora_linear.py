"""Sibling frozen projections with low-rank adapters, fused so that the adapters cost almost no memory traffic.

`stacked` [O + R, D + R] holds the frozen weights W, the lora_B behind them and the lora_A below them:

    [ W  B ]      forward   [x | s x A^T]  times the upper rows, transposed
    [ A  0 ]      backward  [dy | s dy B]  times the left columns

Either product adds the adapter inside one large matrix product. Where the operand to be widened is larger than the
result, the adapter is added to the result in place instead: the smaller of the two is the one that is copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Kind = tuple[int, torch.dtype]


@torch.library.custom_op("ftlib::lora_project", mutates_args=())
def _project(
    x: Tensor, low: Tensor, stacked: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: float,
    gate: Tensor | None,
) -> Tensor:  # fmt: skip
    rank = low.shape[1]  # `low` is behind the gate already, which backward reads
    out, dim = stacked.shape[0] - rank, stacked.shape[1] - rank
    weight = stacked[:out]
    if dim <= out:
        wide = x.new_empty(x.shape[0], dim + rank)
        wide[:, :dim].copy_(x)
        wide[:, dim:].copy_(low)
        return wide @ weight.T
    y = x @ weight[:, :dim].T
    return y.addmm_(low, weight[:, dim:].T)


@_project.register_fake
def _(
    x: Tensor, low: Tensor, stacked: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: float,
    gate: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], stacked.shape[0] - low.shape[1])


@torch.library.custom_op("ftlib::lora_project_backward", mutates_args=())
def _project_backward(
    grad: Tensor, x: Tensor, low: Tensor, stacked: Tensor, scale: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rank = low.shape[1]
    out, dim = stacked.shape[0] - rank, stacked.shape[1] - rank
    if out < dim:
        grad_low = gated((grad @ stacked[:out, dim:]).mul_(scale), gate)
        wide = grad.new_empty(grad.shape[0], out + rank)
        wide[:, :out].copy_(grad)
        wide[:, out:].copy_(grad_low)
        grad_x = wide @ stacked[:, :dim]
    else:
        both = grad @ stacked[:out]
        grad_low = gated(both[:, dim:] * scale, gate)
        grad_x = both[:, :dim].addmm_(grad_low, stacked[out:, :dim])
    return grad_x, grad_low.T @ x, grad.T @ low


@_project_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: Tensor, stacked: Tensor, scale: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rank = low.shape[1]
    out, dim = stacked.shape[0] - rank, stacked.shape[1] - rank
    stored = dim if out < dim else dim + rank
    return (
        grad.new_empty(grad.shape[0], stored)[:, :dim],
        grad.new_empty(rank, dim),
        grad.new_empty(out, rank),
    )


def _setup(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, low, stacked, lora_a, lora_b, ctx.scale, gate = inputs
    ctx.save_for_backward(x, low, stacked, gate)
    ctx.lora_a, ctx.lora_b = kinds(lora_a), kinds(lora_b)


def kinds(factors: Sequence[Tensor]) -> list[Kind]:
    """(rows, dtype) of each."""
    return [(factor.shape[0], factor.dtype) for factor in factors]


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    x, low, stacked, gate = ctx.saved_tensors
    grad_x, grad_a, grad_b = torch.ops.ftlib.lora_project_backward(grad.contiguous(), x, low, stacked, ctx.scale, gate)
    return grad_x, None, None, *split_factors(grad_a, grad_b, ctx.lora_a, ctx.lora_b), None, None


def split_factors(
    grad_a: Tensor, grad_b: Tensor, lora_a: Sequence[Kind], lora_b: Sequence[Kind]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of each layer's factors, in their dtypes, from those of all [R, D] and [O, R]."""
    grads_a, grads_b, row, column = [], [], 0, 0
    for (rank, a_dtype), (out, b_dtype) in zip(lora_a, lora_b, strict=True):
        grads_a.append(grad_a[column : column + rank].to(a_dtype))
        grads_b.append(grad_b[row : row + out, column : column + rank].to(b_dtype))
        row, column = row + out, column + rank
    return grads_a, grads_b


_project.register_autograd(_backward, setup_context=_setup)


def lora_project(
    x: Tensor, stacked: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: float,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [N, O] of sibling layers over x [N, D], their outputs side by side.

    stacked [O + R, D + R] as above, in x's dtype, its copies of the factors current. lora_a [r_i, D] and lora_b
    [out_i, r_i]: the parameters, which receive the gradients. `gate` [] on x's device, of floats: 1, or 0 for the
    frozen projections alone, by the same code. Kept for backward: x, s x A^T and the weights.
    """
    factors = list(lora_a), list(lora_b)
    first = stacked.shape[0] - sum(a.shape[0] for a in lora_a)
    low = low_product(x, stacked[first:, : x.shape[1]], scale, gate)
    return torch.ops.ftlib.lora_project(x, low, stacked, *factors, scale, gate)


def low_product(x: Tensor, lora_a: Tensor, scale: float, gate: Tensor | None) -> Tensor:
    """s x A^T [N, R], whose gradient is the projection's. An operation of its own: it is all that backward needs of the
    forward pass beside x, so who computes that pass again does not repeat the large product."""
    return gated((x.detach() @ lora_a.detach().T) * scale, gate)


def gated(low: Tensor, gate: Tensor | None) -> Tensor:
    """`low`, or zeros where `gate` is there and 0."""
    return low if gate is None else low * gate


def lora_project_reference(
    x: Tensor, stacked: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: float
) -> Tensor:
    """The same with every product on its own, from W and the parameters: the oracle."""
    outs, row = [], 0
    for a, b in zip(lora_a, lora_b, strict=True):
        weight = stacked[row : row + b.shape[0], : x.shape[1]]
        outs.append(x @ weight.T + scale * (x @ a.to(x.dtype).T @ b.to(x.dtype).T))
        row += b.shape[0]
    return torch.cat(outs, -1)
