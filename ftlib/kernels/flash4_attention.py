"""Causal attention by FlashAttention-4, the optional package `flash-attn-4` (`pip install 'ftlib[flash4]'`).

Its kernels are written in CuTe and compiled when first called, some seconds for each kind of call, for Hopper GPUs and
newer. The package is imported when it is first asked for. Sinks are as in ftlib.kernels.varlen_attention. Under
`torch.use_deterministic_algorithms` backward adds up in one order, where the GPU's kernel has one (`in_any_order`).
"""

import importlib
import warnings
from collections.abc import Collection
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ftlib.kernels.varlen_attention import gradient_of_sinks, leave_out, with_sinks

WIDEST = 128  # channels of a head; more are not tested here


@cache
def package() -> ModuleType:
    """The package's functions on tensors, without gradients; an ImportError or OSError where it does not work."""
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # of its own, each time it compiles a kernel
    return importlib.import_module("flash_attn.cute.interface")


def flash4_refusal(device: torch.device, softcap: bool, head_dims: Collection[int]) -> tuple[str, ...] | None:
    """Why a model with these heads, whose scores are capped or not, cannot be served on the GPU `device`, and what
    would help; None if it can."""
    unfit = [dim for dim in head_dims if dim % 8 or dim > WIDEST]
    if unfit:
        return (f"serves heads of up to {WIDEST} channels, multiples of 8, and this model has some of {max(unfit)}",)
    if not torch.cuda.is_available():
        return ("needs a GPU, and there is none here",)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return (f"needs a GPU of compute capability 9.0 (Hopper) or newer, and this one has {major}.{minor}",)
    if softcap and major > 11:
        return (f"cannot cap scores softly on a GPU of compute capability {major}.{minor}",)
    try:
        package()
    except (ImportError, OSError) as error:
        return f"needs the package flash-attn-4, which does not work here ({error})", 'pip install "ftlib[flash4]"'
    return None


def in_any_order(device: torch.device) -> bool:
    """Whether backward's sums have no fixed order on this GPU."""
    return torch.cuda.get_device_capability(device)[0] == 12


def _terms(
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, max_seqlen: int, scale: float, window: int, softcap: float
) -> dict[str, Any]:
    """What forward and backward are told alike."""
    terms: dict[str, Any] = {"softmax_scale": scale, "causal": True, "softcap": softcap}
    if window:
        terms |= {"window_size_left": window - 1, "window_size_right": 0}
    if cu_seqlens is None:
        return terms
    terms |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens if cu_keys is None else cu_keys}
    return terms | {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen if cu_keys is None else None}


@torch.library.custom_op("ftlib::flash4_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_keys: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    terms = _terms(cu_seqlens, cu_keys, max_seqlen, scale, window, softcap)
    out, lse = package()._flash_attn_fwd(q, k, v, return_lse=True, **terms)[:2]
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_keys: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    *rows, tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(*rows, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("ftlib::flash4_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_keys: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = _terms(cu_seqlens, cu_keys, max_seqlen, scale, window, softcap)
    terms["deterministic"] = torch.are_deterministic_algorithms_enabled()  # blocks of keys add to dq in turn
    dq, dk, dv = package()._flash_attn_bwd(q, k, v, out, grad, lse, **terms)
    if cu_keys is not None:
        leave_out(dk, cu_keys)
        leave_out(dv, cu_keys)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_keys: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ANN001
    q, k, v, sinks, cu_seqlens, cu_keys, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_seqlens, cu_keys, *output)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    q, k, v, sinks, cu_seqlens, cu_keys, out, lse = ctx.saved_tensors
    grads = torch.ops.ftlib.flash4_attention_backward(
        grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_keys, *ctx.constants
    )
    wanted = sinks is not None and ctx.needs_input_grad[3]
    of_sinks = gradient_of_sinks(sinks, grad, out, lse) if wanted else None
    return *grads, of_sinks, None, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_setup)


def flash4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    cu_keys: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each document, causal; of q's shape.

    Whole rows, `cu_seqlens` None: q [B, T, heads, D]; k, v [B, T, kv_heads, D]. Packed documents: q [N, heads, D];
    k, v [N, kv_heads, D]; `cu_seqlens` int32 [documents + 1] padded by its last value, and `cu_keys`, are as in
    ftlib.kernels.varlen_attention. float16 or bfloat16 on an SM90 GPU or newer; D a multiple of 8, tested to 128.
    `sinks` [heads]: one more score in each row's softmax, without a value. `softcap`: scores z become
    softcap * tanh(z / softcap).
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    constants = (max_seqlen, scale, window or 0, softcap or 0.0)
    return torch.ops.ftlib.flash4_attention(q, k, v, sinks, cu_seqlens, cu_keys, *constants)[0]
