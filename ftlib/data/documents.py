"""Tokenised rows as flat arrays: a million documents are a few large arrays, not a million objects."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ftlib.data.examples import Example
from ftlib.data.packing import share
from ftlib.layers.batch import IGNORED


@dataclass(frozen=True)
class SourceInfo:
    """Where documents came from."""

    name: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Document:
    """One tokenised row. `input_ids`, `labels`: int32 [n]; labels are shifted once, the last is -100."""

    input_ids: np.ndarray
    labels: np.ndarray
    index: int
    source: str
    example: Example | None = None

    @property
    def messages(self) -> list[dict] | None:
        """The conversation it was made from, where it was kept (held-out rows)."""
        return self.example.messages if self.example else None


class Documents(Sequence[Document]):
    """A sequence of `Document`. `examples` holds the rows they were made from, for held-out documents only.

    `input_ids` int32 and `trained` bool, both [tokens], lie end to end; document i is offsets[i] to offsets[i + 1].
    `source_ids` and `lines` int32 [n] say where each came from.
    """

    def __init__(
        self,
        input_ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        *,
        sources: Sequence[SourceInfo] = (SourceInfo("data", "data"),),
        source_ids: np.ndarray | None = None,
        lines: np.ndarray | None = None,
        examples: list[Example] | None = None,
    ) -> None:
        count = len(offsets) - 1
        self.input_ids, self.trained, self.offsets = input_ids, trained, offsets
        self.sources = tuple(sources)
        self.source_ids = np.zeros(count, np.int32) if source_ids is None else source_ids
        self.lines = np.arange(1, count + 1, dtype=np.int32) if lines is None else lines
        self.examples = examples

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]], **keywords: object) -> "Documents":
        """From (input_ids int [n], trained bool [n]) pairs; the keywords are those of the class."""
        rows = list(rows)
        ids = [np.asarray(ids, np.int32) for ids, _ in rows]
        trained = [np.asarray(mask, bool) for _, mask in rows]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        ids, trained = np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, bool), *trained])
        return cls(ids, trained, offsets, **keywords)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Document:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ids, labels = self.tokens(index)
        example = self.examples[index] if self.examples else None
        return Document(ids, labels, index, self.sources[self.source_ids[index]].name, example)

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of one document, int32 [n] each."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.input_ids[part]
        labels = np.full(len(ids), IGNORED, np.int32)
        np.copyto(labels[:-1], ids[1:], where=self.trained[part][1:])
        return ids, labels

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [n]."""
        return np.diff(self.offsets).astype(np.int32)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """Labels of each document that are not -100, int64 [n]."""
        sums = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        # Nothing predicts a document's first token.
        return np.diff(sums[self.offsets]) - self.trained[self.offsets[:-1]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, masks, boundaries, sources and weights: equal fingerprints give the same batches."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.trained, self.offsets, self.source_ids):
            digest.update(np.ascontiguousarray(array))
        digest.update(repr([source.weight for source in self.sources]).encode())
        return digest.hexdigest()

    @property
    def max_token_id(self) -> int:
        """Largest token id: a model needs more embedding rows than this."""
        return int(self.input_ids.max(initial=0))

    def where(self, index: int) -> str:
        """`file:line` of the row a document was made from."""
        return f"{self.sources[self.source_ids[index]].path}:{self.lines[index]}"

    def select(self, chosen: np.ndarray, keep_examples: bool = True) -> "Documents":
        """The documents where `chosen`, bool [n], is true, in their order."""
        tokens = np.repeat(chosen, self.lengths)
        examples = None
        if self.examples and keep_examples:
            examples = [self.examples[i] for i in np.flatnonzero(chosen)]
        return Documents(
            self.input_ids[tokens],
            self.trained[tokens],
            np.concatenate([[0], np.cumsum(self.lengths[chosen], dtype=np.int64)]),
            sources=self.sources,
            source_ids=self.source_ids[chosen],
            lines=self.lines[chosen],
            examples=examples,
        )

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices (int64) an epoch is made of, before shuffling: each source's rows as often as its weight says."""
        parts = []
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(self.source_ids == number)
            parts.append(own[share(len(own), source.weight, seed, number, epoch)])
        return np.concatenate(parts)
