"""Sibling quantized layers with low-rank adapters in one product (ftlib.kernels.lora_linear).

The matrix [W B; A 0] of that product is made for each call, forward and backward, and let go after it: weights go from
their codes straight into their place in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftlib.kernels.lora_linear import kinds, lora_project, low_product, split_factors
from ftlib.quant.formats import FORMATS


def stack(
    parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """[O + R, D + R] in `dtype` from the parts of each layer's weight, one layer's after the other's."""
    each = len(parts) // len(lora_a)
    out, rank, dim = sum(len(b) for b in lora_b), sum(len(a) for a in lora_a), lora_a[0].shape[1]
    whole = torch.empty(out + rank, dim + rank, dtype=dtype, device=parts[0].device)
    whole[:, dim:].zero_()
    row, column = 0, 0
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        own = parts[i * each : (i + 1) * each]
        FORMATS[form].dequantize(*own, dtype, out=whole[row : row + len(b), :dim])
        whole[row : row + len(b), dim + column : dim + column + len(a)].copy_(b)
        whole[out + column : out + column + len(a), :dim].copy_(a)
        row, column = row + len(b), column + len(a)
    return whole


@torch.library.custom_op("ftlib::frozen_lora_project", mutates_args=())
def _project(
    x: Tensor, low: Tensor, parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: float, gate: Tensor | None,
) -> Tensor:  # fmt: skip
    stacked = stack(parts, form, lora_a, lora_b, x.dtype)
    return torch.ops.ftlib.lora_project(x, low, stacked, list(lora_a), list(lora_b), scale, gate)


@_project.register_fake
def _(
    x: Tensor, low: Tensor, parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: float, gate: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], sum(b.shape[0] for b in lora_b))


@torch.library.custom_op("ftlib::frozen_lora_project_backward", mutates_args=())
def _project_backward(
    grad: Tensor, x: Tensor, low: Tensor, parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scale: float, gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stacked = stack(parts, form, lora_a, lora_b, grad.dtype)
    return torch.ops.ftlib.lora_project_backward(grad, x, low, stacked, scale, gate)


@_project_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: Tensor, parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scale: float, gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rank, dim, out = low.shape[1], x.shape[1], grad.shape[1]
    stacked = grad.new_empty(out + rank, dim + rank)
    return torch.ops.ftlib.lora_project_backward(grad, x, low, stacked, scale, gate)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, low, parts, ctx.form, lora_a, lora_b, ctx.scale, gate = inputs
    ctx.layers = len(lora_a)
    ctx.kinds = kinds(lora_a), kinds(lora_b)
    ctx.save_for_backward(x, low, gate, *lora_a, *lora_b, *parts)


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    x, low, gate, *rest = ctx.saved_tensors
    lora_a, lora_b, parts = rest[: ctx.layers], rest[ctx.layers : 2 * ctx.layers], rest[2 * ctx.layers :]
    grad_x, grad_a, grad_b = torch.ops.ftlib.frozen_lora_project_backward(
        grad.contiguous(), x, low, parts, ctx.form, lora_a, lora_b, ctx.scale, gate
    )
    grads = split_factors(grad_a, grad_b, *ctx.kinds)
    return grad_x, None, [None] * len(parts), None, *grads, None, None


_project.register_autograd(_backward, setup_context=_setup)


def frozen_lora_project(
    x: Tensor, parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: float,
    gate: Tensor | None = None, once: bool = False,
) -> Tensor:  # fmt: skip
    """y [N, O] of sibling layers over x [N, D], their outputs side by side.

    `parts`: of each layer's weight in format `form`, one layer's after the other's. lora_a [r_i, D] and lora_b
    [out_i, r_i]: the parameters, which receive the gradients. `gate` as in `lora_project`. Kept for backward: x,
    s x A^T and what is given.

    `once`, for blocks that are computed again in backward: the matrix made for that is the one that backward multiplies
    by, and not made a third time. Elsewhere it would be kept from forward to backward, the whole model unpacked.
    """
    parts, lora_a, lora_b = list(parts), list(lora_a), list(lora_b)
    if once:
        factors = [[factor.detach() for factor in factors] for factors in (lora_a, lora_b)]
        stacked = torch.ops.ftlib.frozen_stack(parts, form, *factors, x.dtype)
        return lora_project(x, stacked, lora_a, lora_b, scale, gate)
    low = low_product(x, torch.cat(lora_a).to(x.dtype), scale, gate)
    return torch.ops.ftlib.frozen_lora_project(x, low, parts, form, lora_a, lora_b, scale, gate)


@torch.library.custom_op("ftlib::frozen_stack", mutates_args=())
def _stack(
    parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    return stack(parts, form, lora_a, lora_b, dtype)


@_stack.register_fake
def _(
    parts: Sequence[Tensor], form: str, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    out, rank = sum(b.shape[0] for b in lora_b), sum(a.shape[0] for a in lora_a)
    return lora_a[0].new_empty(out + rank, lora_a[0].shape[1] + rank, dtype=dtype)
