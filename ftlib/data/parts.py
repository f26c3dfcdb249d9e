"""Tokenised documents of one source as flat arrays: a million of them are a few large arrays, not objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftlib.data.examples import Example


@dataclass(frozen=True)
class Weights:
    """How much tokens count, of those documents of a part where some count neither 0 nor 1.

    `members` int64 [m]: these documents, ascending; `values` float32: of all their tokens, end to end; `sums` float64
    [m]: over their targets.
    """

    members: np.ndarray
    values: np.ndarray
    sums: np.ndarray


@dataclass
class Part:
    """Documents of one source end to end: `input_ids` int32, `trained` bool, both [tokens]; the rest per document [n].

    `lengths` int32 in tokens; `targets` int32, labels that are not -100; `hashes` uint64 of the ids, equal for repeats;
    `lines` int32 and `file_ids` int32: where in which of `files` a document came from. `examples`: the rows themselves.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    hashes: np.ndarray
    lines: np.ndarray
    file_ids: np.ndarray
    files: Sequence[str]
    digest: str  # SHA-256 of tokens, masks, weights and lengths
    examples: Sequence[Example] | None = None
    pieces: np.ndarray | None = None  # float64 [n, 3], where documents hold several answers (ftlib.data.preference)
    weights: Weights | None = None

    def weight_starts(self) -> np.ndarray:
        """int64 [n]: where in `weights.values` a document begins, -1 where it is not."""
        starts = np.full(len(self.lengths), -1, np.int64)
        if self.weights is not None:
            lengths = self.lengths[self.weights.members]
            starts[self.weights.members] = np.cumsum(lengths, dtype=np.int64) - lengths
        return starts

    def target_weights(self) -> np.ndarray:
        """float64 [n]: the sum of the weights of each document's targets."""
        sums = self.targets.astype(np.float64)
        if self.weights is not None:
            sums[self.weights.members] = self.weights.sums
        return sums
