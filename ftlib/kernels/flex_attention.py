"""Attention with soft-capped scores over packed documents, by PyTorch's FlexAttention: no score is ever kept."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# For fewer than 128 queries torch would take its kernel for decoding, and fails where that has no fitting tiles.
KERNEL = {"BACKEND": "TRITON"}

Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> may the query look at the key?


def block_mask(seen: Seen, rows: int, length: int, device: torch.device) -> BlockMask:
    """Which blocks of [length, length] scores hold a pair that `seen` allows, for each row; no full mask is made."""
    return _compiled(create_block_mask)(seen, rows, None, length, length, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """q [B, heads, T, D]; k, v [B, kv_heads, T, D]. Returns [B, heads, T, D]. No backward on a CPU."""

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    attention = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    return attention(q, k, v, capped if softcap else None, mask, scale, enable_gqa=True, kernel_options=KERNEL)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
