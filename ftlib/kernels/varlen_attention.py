"""Causal attention over packed documents by torch's own FlashAttention-2: no mask is formed, heads may be grouped."""

import torch
from torch import Tensor


@torch.library.custom_op("ftlib::varlen_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False, scale=scale, **_window(window)
    )
    return out, lse, seed, unused


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
        q.new_empty(2, dtype=torch.uint64),
        q.new_empty(0, dtype=torch.uint64),
    )


@torch.library.custom_op("ftlib::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    unused: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, seed, unused,
        scale=scale, **_window(window),
    )  # fmt: skip


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    unused: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _window(window: int) -> dict[str, int]:
    """A query sees itself and window - 1 tokens before it; 0: all of them."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ANN001
    q, k, v, cu_seqlens, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    q, k, v, cu_seqlens, out, lse, seed, unused = ctx.saved_tensors
    grads = torch.ops.ftlib.varlen_attention_backward(
        grad.contiguous(), q, k, v, out, lse, cu_seqlens, seed, unused, *ctx.constants
    )
    return *grads, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    """softmax(scale q k^T) v within each document, causal; [N, heads, D] like q.

    q [N, heads, D]; k, v [N, kv_heads, D]; float16 or bfloat16 on a GPU, D <= 256. cu_seqlens int32 [documents + 1],
    padded by its last value.
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    return torch.ops.ftlib.varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, window or 0)[0]
