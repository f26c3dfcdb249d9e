"""Tokenised rows as flat arrays: a million documents are a few large arrays, in memory or in files, not objects."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ftlib.data.examples import Example
from ftlib.data.packing import share
from ftlib.data.parts import Part
from ftlib.data.store import MemoryWriter
from ftlib.layers.batch import IGNORED, Batch, Piece, from_documents


@dataclass(frozen=True)
class SourceInfo:
    """Where documents came from."""

    name: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Document:
    """One tokenised row. `input_ids`, `labels`: int32 [n]; labels are shifted once, the last is -100.

    `weights` float32 [n]: how much each label counts; None where all count 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    index: int
    source: str
    example: Example | None = None
    weights: np.ndarray | None = None

    @property
    def messages(self) -> list[dict] | None:
        """The conversation it was made from, where it was kept (held-out rows)."""
        return self.example.messages if self.example else None


class Documents(Sequence[Document]):
    """A sequence of `Document` over parts. `examples` holds the rows they were made from, for held-out documents only.

    All [n]: document i is lengths[i] tokens from starts[i] of parts[part_ids[i]], of source source_ids[i].
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        sources: Sequence[SourceInfo],
        part_ids: np.ndarray | None = None,
        members: np.ndarray | None = None,
        source_ids: np.ndarray | None = None,
        keep_examples: bool = True,
    ) -> None:
        """All documents of all parts, or those that `part_ids` and `members` (index within the part) name."""
        self.parts, self.sources = list(parts), tuple(sources)
        counts = [len(part.lengths) for part in parts]
        if members is None:
            part_ids = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
            members = np.concatenate([np.arange(count) for count in counts]) if counts else np.empty(0, np.int64)
        self.part_ids, self.members = part_ids, members
        self.source_ids = part_ids if source_ids is None else source_ids
        self.lengths = self._gather([part.lengths for part in parts], np.int32)
        self.starts = self._gather([np.cumsum(p.lengths, dtype=np.int64) - p.lengths for p in parts], np.int64)
        self.examples: list[Example] | None = None
        if keep_examples and parts and all(part.examples is not None for part in parts):
            self.examples = [parts[p].examples[m] for p, m in zip(part_ids, members, strict=True)]

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        sources: Sequence[SourceInfo] = (SourceInfo("data", "data"),),
        source_ids: np.ndarray | None = None,
    ) -> "Documents":
        """From (input_ids int [n], mask [n]) pairs; a mask is bool, or floats: how much each token counts.

        `source_ids` says of which source each is.
        """
        writer = MemoryWriter([sources[0].path])
        for number, (ids, trained) in enumerate(rows, 1):
            writer.add(np.asarray(ids, np.int32), np.asarray(trained), 0, number, None)
        return cls([writer.finish()], sources=sources, source_ids=source_ids)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Document:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ids, labels = self.tokens(index)
        example = self.examples[index] if self.examples else None
        source = self.sources[self.source_ids[index]].name
        return Document(ids, labels, index, source, example, self.weights(index))

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of one document, int32 [n] each."""
        ids, trained = self.masked(index)
        labels = np.full(len(ids), IGNORED, np.int32)
        np.copyto(labels[:-1], ids[1:], where=trained[1:])
        return ids, labels

    def masked(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32 [n], trained bool [n]) of one document: the mask is not shifted."""
        part, start = self.parts[self.part_ids[index]], self.starts[index]
        chosen = slice(start, start + self.lengths[index])
        return np.asarray(part.input_ids[chosen]), np.asarray(part.trained[chosen])

    def weighed(self, index: int) -> np.ndarray | None:
        """How much each token of one document counts, not shifted, float32 [n]; None: 0 and 1, as its mask says."""
        starts = self._weight_starts
        if starts is None or starts[index] < 0:
            return None
        values = self.parts[self.part_ids[index]].weights.values
        return np.asarray(values[starts[index] : starts[index] + self.lengths[index]])

    def weights(self, index: int) -> np.ndarray | None:
        """The same of its labels, shifted like them."""
        own = self.weighed(index)
        return None if own is None else np.append(own[1:], np.float32(0))

    @cached_property
    def _weight_starts(self) -> np.ndarray | None:
        """Of each document its `Part.weight_starts`, int64 [n]; None where no document has weights."""
        if all(part.weights is None for part in self.parts):
            return None
        starts = self._gather([part.weight_starts() for part in self.parts], np.int64)
        return starts if (starts >= 0).any() else None

    @cached_property
    def target_weights(self) -> np.ndarray:
        """The sum of the weights of each document's labels: float64 [n], or `target_counts` where all are 0 or 1."""
        if self._weight_starts is None:
            return self.target_counts
        return self._gather([part.target_weights() for part in self.parts], np.float64)

    @property
    def weighted(self) -> int:
        """Documents with weights other than 0 and 1."""
        return 0 if self._weight_starts is None else int((self._weight_starts >= 0).sum())

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Labels of each document that are not -100, int64 [n]."""
        return self._gather([part.targets for part in self.parts], np.int64)

    @property
    def compared(self) -> bool:
        """Whether these are answers that are compared or rated: `pieces` says where they are."""
        return bool(self.parts) and all(part.pieces is not None for part in self.parts)

    @cached_property
    def pieces(self) -> np.ndarray:
        """`Part.pieces` of each document, float64 [n, 3]."""
        return np.stack([self._gather([part.pieces[:, i] for part in self.parts], np.float64) for i in range(3)], 1)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [n], equal for documents of equal tokens."""
        return self._gather([part.hashes for part in self.parts], np.uint64)

    @property
    def first_of_each(self) -> np.ndarray:
        """Of each document the index of the first one of equal tokens, int64 [n]."""
        _, first, group = np.unique(self.hashes, return_index=True, return_inverse=True)
        return first[group]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, masks, boundaries, sources and weights: equal fingerprints give the same batches."""
        digest = hashlib.sha256("".join(part.digest for part in self.parts).encode())
        for array in (self.part_ids, self.members, self.source_ids):
            digest.update(np.ascontiguousarray(array, np.int64))
        digest.update(repr([source.weight for source in self.sources]).encode())
        return digest.hexdigest()

    @property
    def max_token_id(self) -> int:
        """Largest token id: a model needs more embedding rows than this."""
        return max((int(part.input_ids.max(initial=0)) for part in self.parts), default=0)

    def where(self, index: int) -> str:
        """`file:line` of the row a document was made from."""
        part, member = self.parts[self.part_ids[index]], self.members[index]
        return f"{part.files[part.file_ids[member]]}:{part.lines[member]}"

    def select(self, chosen: np.ndarray, keep_examples: bool = True) -> "Documents":
        """The documents where `chosen`, bool [n], is true, in their order. No token is copied."""
        return Documents(
            self.parts,
            sources=self.sources,
            part_ids=self.part_ids[chosen],
            members=self.members[chosen],
            source_ids=self.source_ids[chosen],
            keep_examples=keep_examples,
        )

    def shown(self, index: int) -> list[Document]:
        """What `tune preview` prints of document `index`."""
        return [self[index]]

    def batch(self, rows: Sequence[Sequence[int]], seq_len: int, pad_id: int, max_documents: int) -> Batch:
        """Rows [len(rows), seq_len] of these documents (`ftlib.layers.batch.from_documents`)."""
        return from_documents([[self._packed(i) for i in row] for row in rows], seq_len, pad_id, max_documents)

    def _packed(self, index: int) -> Piece:
        weights = self.weights(index)
        return self.tokens(index) if weights is None else (*self.tokens(index), weights)

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices (int64) an epoch is made of, before shuffling: each source's rows as often as its weight says."""
        shares = []
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(self.source_ids == number)
            shares.append(own[share(len(own), source.weight, seed, number, epoch)])
        return np.concatenate(shares)

    def _gather(self, arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        """Of each document its entry in its part's array."""
        firsts = np.cumsum([0, *(len(part.lengths) for part in self.parts)])
        return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)[firsts[self.part_ids] + self.members]
