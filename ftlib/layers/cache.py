"""Keys and values of earlier tokens, for generation one token at a time."""

import torch
from torch import Tensor


class DenseCache:
    """A fixed block [B, slots, kv_heads, D] per layer; a token's slot is its position.

    Rows may hold sequences of different lengths: a right-padded prompt leaves rubbish in the slots after it,
    and each of those is overwritten by the token that reaches its position before any query may see it.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, kv_heads, D] at `position_ids` [B, T]; returns all slots [B, slots, kv_heads, D]."""
        if layer not in self.layers:
            shape = (k.shape[0], self.slots, *k.shape[2:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for store, new in zip(self.layers[layer], (k, v), strict=True):
            store[rows, position_ids] = new
        return self.layers[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every sequence but these (int64 [n]), in this order."""
        self.layers = {i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()}


class CachedLayout:
    """Queries at `position_ids` [B, T] over a `DenseCache`: causal in position, windowed where a layer asks for it."""

    cu_seqlens = None

    def __init__(self, cache: DenseCache, position_ids: Tensor, lengths: Tensor | None = None) -> None:
        """`lengths` [B]: tokens of each sequence so far; by default up to its last query."""
        self.cache, self.position_ids = cache, position_ids
        last = position_ids[:, -1] + 1 if lengths is None else lengths
        self.lengths = last[:, None].expand_as(position_ids)
        self.masks: dict[int | None, Tensor] = {}

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        slot = torch.arange(self.cache.slots, device=self.position_ids.device)
        query = self.position_ids[:, None, :, None]
        for window in windows:
            seen = slot <= query
            self.masks[window] = seen if window is None else seen & (query - slot < window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.extend(layer, k, v, self.position_ids)
