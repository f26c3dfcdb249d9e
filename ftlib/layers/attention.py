"""Softmax attention: the layer, and `attend`, the only place that touches an attention kernel."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.layers.linear import Linear, project
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Rope, rotate


@dataclass(frozen=True, kw_only=True)
class Attn:
    """Grouped-query attention: `heads` queries share `kv_heads` keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head"] = "none"  # RMSNorm on each head's query and key
    window: int | None = None  # a query sees itself and the window - 1 tokens before it


class AttentionLayout(Protocol):
    """Who sees whom, built once per batch (ftlib.layers.batch, ftlib.layers.cache)."""

    masks: dict[int | None, Tensor]

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        """Make what `backend` needs for layers with these windows, before the first layer runs."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values this layer's queries look at: the given ones, or a cache grown by them."""


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, *, backend: str, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys `layout` lets each query see.

    q [B, T, heads, D]; k, v [B, S, kv_heads, D], heads a multiple of kv_heads. Returns [B, T, heads, D].
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = layout.masks[window]
    if backend == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    else:
        y = _reference(q, k, v, mask)
    return y.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain PyTorch, any dtype: the oracle of every other backend."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=wide).to(v.dtype) @ v


def choose_backend(requested: str) -> str:
    """The backend that serves every layer; an explicit choice that cannot is an error that says why."""
    if requested in ("auto", "sdpa"):
        return "sdpa"
    if requested == "reference":
        return requested
    raise UserError(
        f"attention backend {requested!r} is not available here",
        where="model.attention",
        fix="use auto, sdpa or reference",
    )


class Attention(nn.Module):
    """The module of an `Attn`."""

    def __init__(self, spec: Attn, dim: int, norm_eps: float, layer: int) -> None:
        super().__init__()
        self.spec, self.layer, self.backend = spec, layer, "sdpa"
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = Linear(dim, q, bias=spec.qkv_bias)
        self.k_proj = Linear(dim, kv, bias=spec.qkv_bias)
        self.v_proj = Linear(dim, kv, bias=spec.qkv_bias)
        self.o_proj = Linear(q, dim, bias=spec.out_bias)
        if spec.qk_norm == "head":
            self.q_norm = RMSNorm(spec.head_dim, norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, layout: AttentionLayout) -> Tensor:
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x)
        # -1 heads: under tensor parallelism a rank holds only its own.
        q, k, v = (t.unflatten(-1, (-1, self.spec.head_dim)) for t in (q, k, v))
        if self.spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = layout.extend(self.layer, k, v)
        y = attend(q, k, v, layout, backend=self.backend, window=self.spec.window)
        (y,) = project((self.o_proj,), y.flatten(2))
        return y
