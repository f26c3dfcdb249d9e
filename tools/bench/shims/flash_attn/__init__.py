"""flash-attn's functions over the FlashAttention-2 that torch is built with, for peers where the package cannot be had.

Peers find it by its name and version on their PYTHONPATH, and so keep documents apart without padding or a mask, at
the speed of the same kernels. Training only: no dropout, no cache.
"""

import torch
from torch import Tensor

__version__ = "2.8.3"


class _Attention(torch.autograd.Function):
    """Of q [tokens, heads, D], with `cu` [documents + 1] int32 of queries and of keys; heads may be grouped."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu: tuple, longest: tuple, causal: bool, scale: float | None,  # noqa: ANN001
        window: tuple,
    ) -> Tensor:  # fmt: skip
        ctx.window = {
            f"window_size_{side}": width for side, width in zip(("left", "right"), window, strict=True) if width != -1
        }
        ctx.constants = (*longest, 0.0, causal)
        ctx.scale = scale
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *cu, *ctx.constants, False, scale=scale, **ctx.window
        )
        ctx.save_for_backward(q, k, v, out, lse, *cu, seed, unused)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
        *tensors, seed, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *tensors, *ctx.constants, seed, unused, scale=ctx.scale, **ctx.window
        )
        return *grads, None, None, None, None, None


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of [B, T, heads, D]: documents of one length."""
    (rows, *lengths), places = (len(q), q.shape[1], k.shape[1]), torch.arange(len(q) + 1, device=q.device)
    cu = [(places * length).int() for length in lengths]
    flat = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    out = flash_attn_varlen_func(*flat, *cu, *lengths, dropout_p, softmax_scale, causal, window_size, deterministic)
    return out.view(rows, -1, *out.shape[1:])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of documents [tokens, heads, D] side by side."""
    _no(dropout_p, deterministic)
    cu = (cu_seqlens_q.int(), cu_seqlens_k.int())
    longest = (int(max_seqlen_q), int(max_seqlen_k))
    return _Attention.apply(q, k, v, cu, longest, causal, softmax_scale, window_size)


def flash_attn_with_kvcache(*_: object, **__: object) -> Tensor:
    """Not here."""
    raise NotImplementedError("training only")


def _no(dropout: float, deterministic: bool) -> None:
    if dropout or deterministic:
        raise NotImplementedError("neither dropout nor deterministic gradients")
