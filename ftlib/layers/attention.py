"""Softmax attention: the layer, and `attend`, the only place that touches an attention kernel."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.kernels.varlen_attention import varlen_attention
from ftlib.layers.linear import Linear, project
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Rope, Turns, rotate


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
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    scale: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores z become softcap * tanh(z / softcap)
    sinks: bool = False  # a learned score per head takes part in the softmax, and its weight is thrown away

    @property
    def plain(self) -> bool:
        """Whether every kernel can serve it."""
        return self.softcap is None and not self.sinks


class AttentionLayout(Protocol):
    """Who sees whom, built once per batch (ftlib.layers.batch, ftlib.layers.cache)."""

    masks: dict[int | None, Tensor]
    cu_seqlens: Tensor | None  # None: not packed documents
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
    `softcap`: scores z become softcap * tanh(z / softcap). `sinks` [heads]: one more score in each head's softmax, with
    no value. Both need the backend `reference`.
    """
    spread = getattr(layout, "attend", None)
    if spread is not None:  # the tokens of a row lie on several processes (ftlib.parallel.context)
        return spread(q, k, v, backend=backend, window=window, scale=scale, softcap=softcap, sinks=sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "varlen" and layout.cu_seqlens is not None and not (layout.dense and window is None):
        flat = (t.flatten(0, 1) for t in (q, k, v))
        y = varlen_attention(*flat, layout.cu_seqlens, layout.max_seqlen, scale, window)
        return y.view(q.shape)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = layout.masks[window]
    if backend != "reference":
        options = {"is_causal": mask is None, "scale": scale, "enable_gqa": True}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    else:
        y = _reference(q, k, v, mask, scale, softcap, sinks)
    return y.transpose(1, 2)


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


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of every layer: `varlen` on a GPU in half precision, else `sdpa`; `reference` only when asked for.

    `varlen` still hands rows that are one document each to SDPA, whose cuDNN kernel is faster there. An explicit choice
    that cannot serve is a UserError that says why.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    varlen = device.type == "cuda" and half
    if requested == "auto":
        return "varlen" if varlen else "sdpa"
    if requested in ("sdpa", "reference") or (requested == "varlen" and varlen):
        return requested
    why = "needs a CUDA device and dtype bf16" if requested == "varlen" else "is not available here"
    raise UserError(
        f"attention backend {requested!r} {why}", where="model.attention", fix="use auto, sdpa or reference"
    )


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

    def forward(self, x: Tensor, rope: Turns | None, layout: AttentionLayout) -> Tensor:
        spec = self.spec
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x)
        if spec.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        # -1 heads: under tensor parallelism a rank holds only its own.
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotate(t, rope.cos, rope.sin, spec.rope.interleaved) for t in (q, k))
            if rope.query is not None:
                q = q * rope.query[..., None, None].to(q.dtype)
        k, v = layout.extend(self.layer, k, v)
        terms = {"scale": spec.scale, "softcap": spec.softcap, "sinks": self.sinks if spec.sinks else None}
        y = attend(q, k, v, layout, backend=self.backend, window=spec.window, **terms)
        (y,) = project((self.o_proj,), y.flatten(2))
        return y
