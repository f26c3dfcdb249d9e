"""Many small matrix products in one call: each run of rows meets its own matrix (the experts of a mixture)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_TORCH = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # public from torch 2.12 on


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows ends[e - 1] to ends[e] of `x` [N, in] times weight[e]^T, plus bias[e].

    weight [E, out, in] of any strides; bias [E, out]; ends int32 [E], rising, its last value N; a run may be empty.
    Returns [N, out] in the dtype of `x`.
    """
    y = _torch(x, weight, ends) if _served(x, weight) else grouped_linear_reference(x, weight, ends)
    return y if bias is None else y + bias[owners(ends, len(x))]


def owners(ends: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the group each row belongs to."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A loop over the groups: the oracle, any dtype and shape. Waits for the device to learn their sizes."""
    parts, start = [], 0
    for matrix, end in zip(weight.unbind(), ends.tolist(), strict=True):
        parts.append(x[start:end] @ matrix.mT)
        start = end
    return torch.cat(parts)


def _served(x: Tensor, weight: Tensor) -> bool:
    """torch's kernel is written for bf16 on a GPU, with rows and columns of 16 bytes' multiples."""
    return (
        _TORCH is not None
        and x.device.type == "cuda"
        and x.dtype == weight.dtype == torch.bfloat16
        and all(size % 8 == 0 for size in weight.shape[1:])
    )


def _torch(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.ftlib.grouped_linear(x, weight, ends)


# Operators of our own around torch's: a compiler may choose the strides of what it hands to that, and chooses wrongly.
@torch.library.custom_op("ftlib::grouped_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if 1 not in weight.stride()[1:]:  # each matrix by rows or by columns
        weight = weight.contiguous()
    return _TORCH(x.contiguous(), weight.mT, offs=ends)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("ftlib::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left[run]^T right[run] of each run of rows: [N, A], [N, B] -> [E, A, B]."""
    return _TORCH(left.contiguous().T, right.contiguous(), offs=ends)


@_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


def _setup(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN001
    x, weight, ends = ctx.saved_tensors
    grad_x = torch.ops.ftlib.grouped_linear(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    return grad_x, torch.ops.ftlib.grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None, None


_product.register_autograd(_backward, setup_context=_setup)
