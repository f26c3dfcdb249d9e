"""What a model reads: token ids, labels and positions of packed documents, and the layout that keeps them apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ftlib.kernels.flex_attention import BlockMask, Seen, block_mask
from ftlib.layers.attention import PACKED

IGNORED = -100  # a label that takes no part in the loss
MULTIPLE = 64  # of which the lengths of rows that are no longer than they need to be are multiples
Piece = tuple[np.ndarray, ...]  # input_ids and labels of a document, and the weights of its labels if not all are 1


@dataclass(eq=False)
class Layout:
    """Who sees whom in a batch of shape [B, T]: a token sees itself and the earlier tokens of its own document.

    `cu_seqlens` int32 [n]: document d covers positions cu_seqlens[d] to cu_seqlens[d + 1] of the B*T flattened tokens;
    the last value, B*T, is repeated so that n is the same for every batch of a run. No document crosses a row.
    `max_seqlen` bounds a document's length, and is T of the batch: constant where documents are packed. `extent` int32
    [2] has what a batch's own numbers are, documents and tokens of the longest; it stays on the CPU, where a kernel's
    launch reads it, and is a tensor so that compiled code is the same for all. The kind is `packed`; shared prefix,
    paged and bidirectional layouts are further classes.

    Attention backends build what they need in `prepare`, once per batch and before the first layer runs, so that
    compiled blocks only ever read it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int]
    kind: str = "packed"
    extent: Tensor | None = None
    masks: dict[int | None, Tensor | BlockMask | None] = field(default_factory=dict, repr=False)
    _document_ids: Tensor | None = field(default=None, repr=False)

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, max_seqlen: int, shape: tuple[int, int], extent: Tensor | None = None
    ) -> "Layout":
        """Documents side by side in rows. `cu_seqlens` int32 [n] and `extent` as described above, `shape` = (B, T)."""
        return cls(cu_seqlens, max_seqlen, tuple(shape), extent=extent)

    @property
    def dense(self) -> bool:
        """Every row is one whole document: plain causal attention. Known from the shapes, without a look at values."""
        return self.cu_seqlens.shape[0] == self.shape[0] + 1

    @property
    def document_ids(self) -> Tensor:
        """int32 [B, T] on the device of `cu_seqlens`: equal for two tokens exactly when they share a document."""
        if self._document_ids is None:
            at = torch.arange(self.shape[0] * self.shape[1], dtype=torch.int32, device=self.cu_seqlens.device)
            ids = torch.searchsorted(self.cu_seqlens[1:].contiguous(), at, right=True, out_int32=True)
            self._document_ids = ids.view(self.shape)
        return self._document_ids

    @property
    def lengths(self) -> Tensor:
        """int32 [B, T]: tokens of the document each token belongs to."""
        return self.cu_seqlens.diff()[self.document_ids.long()]

    def prepare(self, backend: str, windows: set[int | None]) -> None:
        """Fill `masks`, bool [B, 1, T, T] (True: the key is seen) or blocks for `flex`, for layers with these windows.

        None stands for plain causal attention over whole rows, which backends have a fast path for.
        """
        if backend in PACKED:  # they need none; a window-less layer over whole rows is plain causal attention
            self.masks |= dict.fromkeys(windows)
            return
        for window in windows - self.masks.keys():
            if backend == "flex":
                self.masks[window] = block_mask(self._seen(window), *self.shape, self.cu_seqlens.device)
            else:
                self.masks[window] = None if self.dense and window is None else self._mask(window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that queries look at: while training, exactly those of the batch."""
        return k, v

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Layout":
        """The same layout on `device`; what was derived is derived again there."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return replace(self, cu_seqlens=cu_seqlens, masks={}, _document_ids=None)

    def pin_memory(self) -> "Layout":
        """The same layout in page-locked memory."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())

    def _mask(self, window: int | None) -> Tensor:
        row, at = (torch.arange(size, device=self.cu_seqlens.device) for size in self.shape)
        return self._seen(window)(row[:, None, None, None], row.new_zeros(()), at[:, None], at)

    def _seen(self, window: int | None) -> Seen:
        ids = self.document_ids

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (query >= key) if window is None else (query >= key) & (query - key < window)
            return (ids[row, query] == ids[row, key]) & near

        return seen


@dataclass(eq=False)
class Batch:
    """One forward pass. All int64 [B, T]: `input_ids`; `labels`, already shifted: labels[t] is the target of position
    t, -100 where there is none; `position_ids`, from 0 in each document. The padding tail of a row is a document of its
    own with labels -100. `weights` float32 [B, T]: how much each target counts, 0 where there is none; None: 1 each.

    `target_tokens` (labels that are not -100) and `tokens` (all but padding) are Python ints that the loader knows in
    advance. Left out, they are counted here, which waits for the device when the tensors live on a GPU.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    layout: Layout
    target_tokens: int | None = None
    tokens: int | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.target_tokens is None:
            self.target_tokens = int((self.labels != IGNORED).sum())
        if self.tokens is None:
            self.tokens = self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking), self.layout.to(device, non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where a copy to the GPU need not wait."""
        return self._each(Tensor.pin_memory, self.layout.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor], layout: Layout) -> "Batch":
        tensors = (move(t) for t in (self.input_ids, self.labels, self.position_ids))
        weights = None if self.weights is None else move(self.weights)
        return Batch(*tensors, layout, self.target_tokens, self.tokens, weights)


def from_documents(
    rows: Sequence[Sequence[Piece]], seq_len: int, pad_id: int, max_documents: int
) -> Batch:
    """A batch [len(rows), seq_len] on the CPU. A row is the documents packed into it, each (input_ids, labels) or
    (input_ids, labels, weights) of one length; a row without documents is padding from end to end. The batch has
    weights if one of its documents has.

    `max_documents`: most documents a row of this run may hold; it fixes the length of `cu_seqlens` at
    len(rows) * (max_documents + 1) + 1, the extra one being a row's padding tail. ValueError if a row does not fit.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    position_ids = np.empty(shape, np.int64)
    weighted = any(len(document) == 3 for documents in rows for document in documents)
    weights = np.zeros(shape, np.float32) if weighted else None
    ends, tokens = [0], 0
    for row, documents in enumerate(rows):
        at = 0
        for ids, targets, *own in documents:
            end = at + len(ids)
            if end > seq_len:
                break
            input_ids[row, at:end] = ids
            labels[row, at:end] = targets
            if weighted:
                weights[row, at:end] = own[0] if own else targets != IGNORED
            position_ids[row, at:end] = np.arange(len(ids))
            ends.append(row * seq_len + end)
            at = end
        if len(documents) > max_documents or sum(len(ids) for ids, *_ in documents) > seq_len:
            raise ValueError(f"row {row} does not fit {max_documents} documents of together {seq_len} tokens")
        if at < seq_len:
            position_ids[row, at:] = np.arange(seq_len - at)
            ends.append((row + 1) * seq_len)
        tokens += at
    cu_seqlens = np.full(shape[0] * (max_documents + 1) + 1, shape[0] * seq_len, np.int32)
    cu_seqlens[: len(ends)] = ends
    extent = np.array((len(ends) - 1, np.diff(ends).max()), np.int32)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(position_ids),
        Layout.packed(torch.from_numpy(cu_seqlens), seq_len, shape, torch.from_numpy(extent)),
        int((labels != IGNORED).sum()),
        tokens,
        torch.from_numpy(weights) if weighted else None,
    )
