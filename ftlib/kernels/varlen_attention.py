"""Causal attention over packed documents by torch's own FlashAttention-2: no mask is formed, heads may be grouped.

Sinks, a score per head that takes part in the softmax and whose weight is thrown away, need no kernel of their own. Let
l be the logarithm of a row's sum of exponentials and L = log(exp(l) + exp(sink)): the output is the one without sinks
times exp(l - L), and FlashAttention's backward, which reads output and l, gives the gradients of the new output when it
is handed that and L.
"""

import torch
from torch import Tensor

BLOCK = 128  # tokens


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, length: int, scale: float, window: int,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_keys, length, length, 0.0, causal, False, scale=scale, **_window(window)
    )[:4]


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_keys: Tensor,
    seed: Tensor, unused: Tensor, length: int, scale: float, window: int, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, cu_keys, length, length, 0.0, causal, seed, unused,
        scale=scale, **_window(window),
    )  # fmt: skip


def _window(window: int) -> dict[str, int]:
    """A query sees itself and window - 1 tokens before it; 0: all of them."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _cut(cu_seqlens: Tensor, cu_keys: Tensor, extent: Tensor | None, length: int) -> tuple[Tensor, Tensor, int]:
    """Where documents lie and the bound of their lengths, for this batch instead of any: the kernels begin a block for
    each BLOCK tokens within that bound of each document, padded ones too, which ends at once but not for nothing."""
    if extent is None:
        return cu_seqlens, cu_keys, length
    documents, longest = extent.tolist()
    alike = cu_keys is cu_seqlens
    cu_seqlens = cu_seqlens[: documents + 1]
    return cu_seqlens, cu_seqlens if alike else cu_keys[: documents + 1], min(length, -(-longest // BLOCK) * BLOCK)


@torch.library.custom_op("ftlib::varlen_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    cu_keys: Tensor,
    extent: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    where = _cut(cu_seqlens, cu_keys, extent, max_seqlen)
    out, lse, seed, unused = _forward(q, k, v, *where, scale, window)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, lse, seed, unused


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., N, heads, D] and lse [..., heads, N] that take part with `sinks` [heads], of those without."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * (lse - total).exp().mT[..., None]).to(out.dtype), total


def gradient_of_sinks(sinks: Tensor, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Gradient [heads] of `sinks`: `grad` that of the output, `out` and `lse` what `with_sinks` returned."""
    share = (sinks.to(lse.dtype)[:, None] - lse).exp()  # of the softmax, [..., heads, N]
    by_token = share.mT * (grad * out).sum(-1, dtype=lse.dtype)
    return -by_token.flatten(0, -2).sum(0).to(sinks.dtype)


def leave_out(of_keys: Tensor, cu_keys: Tensor) -> None:
    """Zero, in place, what a kernel left in gradients [N, ...] of keys behind the last document."""
    nobody = torch.arange(len(of_keys), device=of_keys.device) >= cu_keys[-1]
    of_keys.masked_fill_(nobody[:, None, None], 0)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    cu_keys: Tensor,
    extent: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
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
    cu_keys: Tensor,
    extent: Tensor | None,
    seed: Tensor,
    unused: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, cu_keys, length = _cut(cu_seqlens, cu_keys, extent, max_seqlen)
    grads = _backward(grad, q, k, v, out, lse, cu_seqlens, cu_keys, seed, unused, length, scale, window)
    if cu_keys is not cu_seqlens:
        for of_keys in grads[1:]:
            leave_out(of_keys, cu_keys)
    return grads


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_keys: Tensor,
    extent: Tensor | None,
    seed: Tensor,
    unused: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ANN001
    q, k, v, sinks, cu_seqlens, cu_keys, extent, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_seqlens, cu_keys, extent, *output)


def _gradients(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    q, k, v, sinks, cu_seqlens, cu_keys, extent, out, lse, seed, unused = ctx.saved_tensors
    grads = torch.ops.ftlib.varlen_attention_backward(
        grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_keys, extent, seed, unused, *ctx.constants
    )
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        of_sinks = gradient_of_sinks(sinks, grad, out, lse)
    return *grads, of_sinks, None, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_setup)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    cu_keys: Tensor | None = None,
    extent: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each document, causal; [N, heads, D] like q.

    q [N, heads, D]; k, v [N, kv_heads, D]; float16 or bfloat16 on a GPU, D <= 256. cu_seqlens int32 [documents + 1],
    padded by its last value. `sinks` [heads]: one more score in each row's softmax, without a value.
    `cu_keys`, like cu_seqlens: where documents lie among more keys than queries; the last of a document's queries then
    stands at the last of its keys. `extent` int32 [2], on the CPU: documents of this batch, tokens of its longest.
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    where = (cu_seqlens, cu_seqlens if cu_keys is None else cu_keys, extent, max_seqlen)
    return torch.ops.ftlib.varlen_attention(q, k, v, sinks, *where, scale, window or 0)[0]
