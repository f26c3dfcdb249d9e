"""Context parallelism: the tokens of a row lie on several processes, and documents still never see each other.

`ulysses` (Jacobs et al. 2023, arXiv 2309.14509) trades sequence for heads before attention and back after it: each
process sees whole rows for some of the heads, with any attention kernel. `allgather` keeps queries where they are and
gathers keys and values, which grouped queries make small; each process holds an early and a late piece of the row, so
that causal attention is the same work for all. `ring` (ftlib.parallel.ring) has the same pieces, and keys and values
that travel instead, so that no process ever holds, or keeps for backward, those of a whole row.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ftlib.layers.attention import PACKED, attend, attend_packed
from ftlib.layers.batch import IGNORED, Batch, Layout
from ftlib.parallel.collectives import exchange, gather
from ftlib.parallel.ring import ring_attention, who_sees_whom


def share(batch: Batch, group: ProcessGroup, style: str) -> Batch:
    """This process's tokens of a batch [B, T] that every process of `group` has: [B, T / size].

    Labels were shifted and positions counted before, so both simply go with their tokens.
    """
    layout = ContextLayout(batch.layout, group, style)
    at = layout.order
    labels = batch.labels[:, at].contiguous()
    return Batch(
        batch.input_ids[:, at].contiguous(),
        labels,
        batch.position_ids[:, at].contiguous(),
        layout,
        int((labels != IGNORED).sum()),
        batch.tokens,
        None if batch.weights is None else batch.weights[:, at].contiguous(),
    )


@dataclass(eq=False)
class ContextLayout:
    """Who sees whom when this process holds columns `order` of every row. `whole` is the layout of whole rows."""

    whole: Layout
    group: ProcessGroup
    style: str  # `ulysses`, `allgather` or `ring`
    masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    bounds: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    pairs: list[Tensor] = field(default_factory=list, repr=False)  # of pieces in a ring: who sees whom
    cu_seqlens: Tensor | None = None  # local tokens are no packed documents

    @property
    def order(self) -> Tensor:
        """Columns of a whole row that this process holds, int64 [T / size]."""
        return torch.cat([torch.arange(*bounds, device=self.whole.cu_seqlens.device) for bounds in self._pieces()])

    @property
    def lengths(self) -> Tensor:
        """int32 [B, T / size]: tokens of the document each token belongs to."""
        return self.whole.lengths[:, self.order]

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        """What whole rows need, or this process's queries over all keys: masks, or where the documents lie."""
        if self.style == "ulysses":
            self.whole.prepare(backend, windows)
            return
        if self.style == "ring":
            self.pairs = who_sees_whom(self.whole, self.group.rank(), self.group.size(), backend == "varlen")
            return
        if backend in PACKED:
            self.bounds = [_bounds(self.whole, *bounds) for bounds in self._pieces()]
            return
        documents = self.whole.document_ids
        for window in windows - self.masks.keys():
            self.masks[window] = [_mask(documents, *bounds, window) for bounds in self._pieces()]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is added: training has no cache."""
        return k, v

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ContextLayout":
        """The same layout on `device`."""
        return replace(self, whole=self.whole.to(device, non_blocking), masks={}, bounds=[], pairs=[])

    def pin_memory(self) -> "ContextLayout":
        """The same layout in page-locked memory."""
        return replace(self, whole=replace(self.whole, cu_seqlens=self.whole.cu_seqlens.pin_memory()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`ftlib.layers.attention.attend` for queries, keys and values of local tokens [B, T / size, heads, D]."""
        return getattr(self, f"_{self.style}")(q, k, v, **options)

    def _ulysses(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
        size = self.group.size()
        repeats = size // math.gcd(k.shape[2], size)  # fewer key heads than processes: they are copied
        k, v = (t.repeat_interleave(repeats, 2) if repeats > 1 else t for t in (k, v))
        q, k, v = (_to_heads(t, self.group) for t in (q, k, v))
        if sinks is not None:
            sinks = sinks.chunk(size)[self.group.rank()]
        return _to_tokens(attend(q, k, v, self.whole, sinks=sinks, **options), self.group)

    def _ring(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, **options: Any) -> Tensor:
        """Other options are as `ftlib.parallel.check` has seen to."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ring_attention(q, k, v, self.pairs, scale, self.group.rank(), self.group.size(), self.group.group_name)

    def _allgather(
        self, q: Tensor, k: Tensor, v: Tensor, *, backend: str, window: int | None, **options: Any
    ) -> Tensor:
        k, v = (self._in_order(gather(t, 1, self.group)) for t in (k, v))
        if backend in PACKED:
            return self._by_documents(q, k, v, window, backend=backend, **options)
        options["backend"] = backend
        parts, at = [], 0
        for (start, stop), mask in zip(self._pieces(), self.masks[window], strict=True):
            piece = _Rectangle({window: mask})
            queries = q[:, at : at + stop - start]
            parts.append(attend(queries, k[:, :stop], v[:, :stop], piece, window=window, **options))
            at += stop - start
        return torch.cat(parts, 1)

    def _by_documents(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float | None,
        sinks: Tensor | None,
        softcap: float | None,
        backend: str,
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        parts = []
        for piece, (queries, keys) in zip(q.chunk(2, 1), self.bounds, strict=True):
            where = (queries, self.whole.max_seqlen, scale, window, sinks, keys)
            parts.append(attend_packed(piece, k, v, *where, softcap, backend))
        return torch.cat(parts, 1)

    def _pieces(self) -> list[tuple[int, int]]:
        """Columns [start, stop) that this process holds, in order."""
        size, rank, length = self.group.size(), self.group.rank(), self.whole.shape[1]
        if self.style == "ulysses":
            return [(rank * length // size, (rank + 1) * length // size)]
        piece = length // (2 * size)
        return [(i * piece, (i + 1) * piece) for i in (rank, 2 * size - 1 - rank)]

    def _in_order(self, gathered: Tensor) -> Tensor:
        """Rows as they were, from what the processes hold side by side."""
        pieces = gathered.chunk(2 * self.group.size(), 1)
        return torch.cat((*pieces[::2], *reversed(pieces[1::2])), 1)


@dataclass(eq=False)
class _Rectangle:
    """A layout of some queries over more keys: only a mask knows who sees whom."""

    masks: dict[int | None, Tensor]
    cu_seqlens: Tensor | None = None


def _bounds(whole: Layout, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens and cu_keys (ftlib.kernels.varlen_attention) of columns `start` to `stop` of rows over whole rows.

    Of each document: its keys up to `stop`, seen by those of its queries that are here; then its other keys, seen by
    none.
    """
    first, last = whole.cu_seqlens[:-1], whole.cu_seqlens[1:]
    row = first // whole.shape[1] * whole.shape[1]
    end = (row + stop).clamp(first, last)
    keys = torch.stack((first, end), 1).flatten()
    count = end - (row + start).clamp(first, end)
    queries = torch.stack((count, torch.zeros_like(count)), 1).flatten().cumsum(0, dtype=torch.int32)
    return torch.cat((queries.new_zeros(1), queries)), torch.cat((keys, last[-1:]))


def _mask(documents: Tensor, start: int, stop: int, window: int | None) -> Tensor:
    """bool [B, 1, stop - start, stop]: which keys from 0 to `stop` the queries from `start` to `stop` see."""
    at = torch.arange(stop, device=documents.device)
    distance = at[start:, None] - at
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return ((documents[:, start:stop, None] == documents[:, None, :stop]) & near)[:, None]


def _to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, T / n, H, D] of some tokens -> [B, T, H / n, D] of some heads."""
    x = exchange(x.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous(), group)
    return x.movedim(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """The way back."""
    x = exchange(x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous(), group)
    return x.movedim(0, 2).flatten(2, 3)
