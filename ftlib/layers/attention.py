"""Softmax attention: the layer, and `attend`, the only place that touches an attention kernel."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.kernels.capability import without_bf16
from ftlib.kernels.flash4_attention import flash4_attention, flash4_refusal
from ftlib.kernels.flex_attention import BlockMask, flex
from ftlib.kernels.varlen_attention import varlen_attention
from ftlib.layers.linear import Linear, project
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Rope, Turns, rotate

PACKED = ("varlen", "flash4")  # backends that read where documents begin, and need no mask
TRIED = {64, 128}  # channels of a head with which `flash4` has run
FAST = ("flash4", "varlen", "flex")  # what `auto` tries first in half precision, on a GPU that has bf16


@dataclass(frozen=True, kw_only=True)
class Attn:
    """Grouped-query attention: `heads` queries share `kv_heads` keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"  # RMSNorm of query and key: of each head, or over all heads
    norm_after_rope: bool = False  # `qk_norm` of each head sees queries and keys that have turned
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    scale: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores z become softcap * tanh(z / softcap)
    ssmax: float | None = None  # first value of a learned factor per head of queries, beside `rope.query_scale`
    sinks: bool = False  # a learned score per head takes part in the softmax, and its weight is thrown away


class AttentionLayout(Protocol):
    """Who sees whom, built once per batch (ftlib.layers.batch, ftlib.layers.cache)."""

    masks: dict[int | None, Tensor | BlockMask | None]
    cu_seqlens: Tensor | None  # None: not packed documents
    extent: Tensor | None
    lengths: Tensor  # int [B, T]: of each token's document

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        """Make what `backend` needs for layers with these windows, before the first layer runs."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values this layer's queries look at: the given ones, or a cache grown by them."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    *,
    backend: str,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys `layout` lets each query see; `scale` is 1 / sqrt(D) when not given.

    q [B, T, heads, D]; k, v [B, S, kv_heads, D], heads a multiple of kv_heads. Returns [B, T, heads, D].
    `softcap`: scores z become softcap * tanh(z / softcap), by the backends `flex`, `flash4` and `reference`. `sinks`
    [heads]: one more score in each head's softmax, with no value.
    """
    spread = getattr(layout, "attend", None)
    if spread is not None:  # the tokens of a row lie on several processes (ftlib.parallel.context)
        return spread(q, k, v, backend=backend, window=window, scale=scale, softcap=softcap, sinks=sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend in PACKED and layout.cu_seqlens is not None:
        if backend == "flash4" and layout.dense:
            return flash4_attention(q, k, v, None, 0, scale, window, sinks, softcap=softcap)
        if not layout.dense or window is not None or sinks is not None:  # else SDPA's causal kernels are faster
            where = (layout.cu_seqlens, layout.max_seqlen, scale, window, sinks, None)
            return attend_packed(q, k.flatten(0, 1), v.flatten(0, 1), *where, softcap, backend, layout.extent)
    return attend_masked(q, k, v, layout.masks[window], backend, scale, softcap, sinks)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    cu_keys: Tensor | None,
    softcap: float | None,
    backend: str,
    extent: Tensor | None = None,
) -> Tensor:
    """`attend` for q [B, T, heads, D] by a backend of `PACKED`; keys and values lie in a row, [S, kv_heads, D].

    `cu_seqlens`, `cu_keys`, `extent`: see ftlib.kernels.varlen_attention. `varlen` caps no scores.
    """
    where = (q.flatten(0, 1), k, v, cu_seqlens, max_seqlen, scale, window, sinks, cu_keys)
    y = flash4_attention(*where, softcap) if backend == "flash4" else varlen_attention(*where, extent)
    return y.view(q.shape)


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    backend: str,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend` where a mask, bool [B, 1, T, S] and True where a key is seen, says all (None: causal)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if isinstance(mask, BlockMask):
        y = flex(q, k, v, mask, scale, softcap)
    elif backend != "reference" and softcap is None:
        y = _sdpa(q, k, v, mask, scale, sinks)
    else:
        y = _reference(q, k, v, mask, scale, softcap, sinks)
    return y.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None) -> Tensor:
    """torch's own choice of kernel. A sink is one more key that everyone sees: a channel of its own, in which queries
    carry sink / scale and no other key anything; its value is 0."""
    width = v.shape[-1]
    if sinks is not None:
        channel = (sinks / scale).to(q.dtype)[None, :, None, None].expand(*q.shape[:-1], 1)
        q = F.pad(torch.cat((q, channel), -1), (0, 7))  # kernels want a multiple of 8 channels
        k, v = F.pad(k, (0, 8)), F.pad(v, (0, 8, 0, 1))
        key = F.one_hot(torch.tensor(width, device=k.device), width + 8).to(k.dtype)
        k = torch.cat((k, key.expand(*k.shape[:2], 1, -1)), 2)
        if mask is None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = F.pad(mask, (0, 1), value=True)
    options = {"is_causal": mask is None, "scale": scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)[..., :width]


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Plain PyTorch, any dtype: the oracle of every other backend."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    weights = scores.softmax(-1, dtype=wide).to(v.dtype)
    return weights[..., : k.shape[-2]] @ v


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    softcap: bool = False,
    sinks: bool = False,
    head_dims: Collection[int] = (),
) -> str:
    """The backend of every layer; `auto`: the first that `serving` gives for this model.

    An explicit choice that cannot serve is a UserError that says why.
    """
    model = (softcap, sinks, head_dims)
    if requested == "auto":
        return next(serving(device, dtype, *model))
    refusal = _refusal(requested, device, dtype, *model)
    if refusal is None:
        return requested
    why, *fix = refusal
    others = "use auto or reference" if softcap else "use auto, sdpa or reference"
    raise UserError(f"attention backend {requested!r} {why}", where="model.attention", fix=", or ".join((*fix, others)))


def serving(
    device: torch.device, dtype: torch.dtype, softcap: bool, sinks: bool, head_dims: Collection[int]
) -> Iterator[str]:
    """What can serve a model with these `head_dims`, with capped scores (`softcap`) and with `sinks`, in the order of
    speed: `FAST` in half precision on a GPU of compute capability 8.0 or newer, `sdpa`, and `reference`, for all.

    `flash4` where it was measured: heads of `TRIED`, in bfloat16, on Hopper GPUs. `varlen` still hands rows that are
    one document each to SDPA, whose cuDNN kernel is faster there.
    """
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    fast = FAST if half and not without_bf16(device) else ()
    fits = [name for name in (*fast, "sdpa") if _refusal(name, device, dtype, softcap, sinks, head_dims) is None]
    if "flash4" in fits:
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        if not (hopper and dtype == torch.bfloat16 and set(head_dims) <= TRIED):
            fits.remove("flash4")
    return iter((*fits, "reference"))


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, softcap: bool, sinks: bool, head_dims: Collection[int]
) -> tuple[str, ...] | None:
    """Why a backend cannot serve, and what more there is to do about it than to take another; None if it can."""
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if softcap and name not in ("reference", "flex", "flash4"):
        return ("cannot cap scores softly, as this model does (attn_logit_softcapping)",)
    if name in PACKED and not half:
        return ("needs a CUDA device and dtype bf16",)
    if name == "varlen" and (old := without_bf16(device)):
        return (f"needs a GPU of compute capability 8.0 (Ampere) or newer, and this one has {old}",)
    if name == "flex" and (sinks or device.type != "cuda"):
        return ("has no attention sinks, as this model does" if sinks else "needs a CUDA device",)
    return flash4_refusal(device, softcap, head_dims) if name == "flash4" else None


class Attention(nn.Module):
    """The module of an `Attn`."""

    def __init__(self, spec: Attn, dim: int, norm_eps: float, layer: int, zero_centered: bool = False) -> None:
        super().__init__()
        self.spec, self.layer, self.backend = spec, layer, "sdpa"
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = Linear(dim, q, bias=spec.qkv_bias)
        self.k_proj = Linear(dim, kv, bias=spec.qkv_bias)
        self.v_proj = Linear(dim, kv, bias=spec.qkv_bias)
        self.o_proj = Linear(q, dim, bias=spec.out_bias)
        if spec.qk_norm != "none":
            widths = (q, kv) if spec.qk_norm == "all" else (spec.head_dim, spec.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(width, norm_eps, zero_centered) for width in widths)
        if spec.sinks:
            self.sinks = nn.Parameter(torch.zeros(spec.heads))
        if spec.ssmax is not None:
            self.ssmax = nn.Parameter(torch.full((spec.heads,), spec.ssmax))

    def forward(self, x: Tensor, rope: Turns | None, layout: AttentionLayout) -> Tensor:
        spec = self.spec
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x)
        if spec.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        # -1 heads: under tensor parallelism a rank holds only its own.
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in (q, k, v))
        if spec.qk_norm == "head" and not spec.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotate(t, rope.cos, rope.sin, spec.rope.interleaved) for t in (q, k))
        if spec.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and rope.query is not None:  # a norm after it would undo it
            q = q * self.query_scale(rope.query)[..., None].to(q.dtype)
        k, v = layout.extend(self.layer, k, v)
        terms = {"scale": spec.scale, "softcap": spec.softcap, "sinks": self.sinks if spec.sinks else None}
        y = attend(q, k, v, layout, backend=self.backend, window=spec.window, **terms)
        (y,) = project((self.o_proj,), y.flatten(2))
        return y

    def query_scale(self, scale: Tensor) -> Tensor:
        """What queries are multiplied with, float32 at least [B, T, 1 or heads]; `scale` [B, T]: their positions'."""
        if self.spec.ssmax is None:
            return scale[..., None]
        if self.spec.window is not None:
            scale = scale.clamp(max=math.log(self.spec.window))  # no more keys are seen than those of the window
        return scale[..., None] * self.ssmax.to(torch.promote_types(self.ssmax.dtype, torch.float32))
