"""Answers to one prompt behind a single copy of it: each sees the prompt and itself, and no other answer."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ftlib.errors import UserError
from ftlib.kernels.flex_attention import Seen
from ftlib.layers.attention import PACKED, attend_masked, attend_packed
from ftlib.layers.batch import Layout


@dataclass(eq=False)
class SharedPrefix(Layout):
    """Segments side by side in rows: prompts, answers, padding. `cu_seqlens` int32 [n + 1] as in `Layout`, of segments.

    `parents` int32 [n]: the segment that a segment continues, itself for prompts and padding. `positions` int64 [B, T]:
    places in the text that a token ends; an answer goes on where its prompt ends. `extent`: a segment's length counts
    with what it continues. `most_keys`: no batch of the run has segments that read more keys together, a prompt's
    counted once for each answer too.
    """

    most_keys: int = 0
    parents: Tensor | None = None
    positions: Tensor | None = None
    _keys: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def dense(self) -> bool:
        """Never plain causal attention."""
        return False

    @property
    def lengths(self) -> Tensor:
        """A prompt belongs to texts of several lengths."""
        raise UserError(
            "a model whose positions depend on the length of a text cannot share prompts",
            where="dpo.share_prompt, reward.share_prompt",
            fix="set it to false",
        )

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        """Masks, or for backends that need none which keys each segment reads."""
        if backend not in PACKED:
            return super().prepare(backend, windows)
        if self._keys is None:
            self._keys = self._gathered()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        backend: str,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`ftlib.layers.attention.attend` under this layout."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if backend not in PACKED:
            return attend_masked(q, k, v, self.masks[window], backend, scale, softcap, sinks)
        index, cu_keys = self._keys
        k, v = (t.flatten(0, 1)[index] for t in (k, v))
        where = (self.cu_seqlens, self.max_seqlen, scale, window, sinks, cu_keys)
        return attend_packed(q, k, v, *where, softcap, backend, self.extent)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SharedPrefix":
        """The same layout on `device`."""
        parts = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("parents", "positions")}
        return replace(super().to(device, non_blocking), **parts, _keys=None)

    def pin_memory(self) -> "SharedPrefix":
        """The same layout in page-locked memory."""
        parts = {name: getattr(self, name).pin_memory() for name in ("parents", "positions")}
        return replace(super().pin_memory(), **parts)

    def _seen(self, window: int | None) -> Seen:
        ids, positions = self.document_ids, self.positions
        parent = self.parents[ids.long()]

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            above = (parent[row, query] == ids[row, key]) & (parent[row, query] != ids[row, query])
            found = ((ids[row, query] == ids[row, key]) & (query >= key)) | above
            return found if window is None else found & (positions[row, query] - positions[row, key] < window)

        return seen

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Places of the keys that each segment reads, its parent's and its own, one segment after the other, and where
        they begin, int32 [n + 1]. `most_keys`, whatever their number: shapes do not change in a run."""
        starts, sizes = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        parents = self.parents.long()
        above = sizes[parents].where(parents != torch.arange(len(parents), device=parents.device), 0)
        cu_keys = torch.cat((starts[:1], (above + sizes).cumsum(0)))
        at = torch.arange(self.most_keys, device=starts.device)
        segment = torch.searchsorted(cu_keys[1:].contiguous(), at, right=True).clamp(max=len(starts) - 1)
        offset = at - cu_keys[segment]
        index = torch.where(
            offset < above[segment], starts[parents[segment]] + offset, starts[segment] + offset - above[segment]
        )
        return index.where(at < cu_keys[-1], 0), cu_keys.int()
