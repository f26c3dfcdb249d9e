"""What loading found: one line a fact, printed before training starts."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ftlib.data.documents import Documents

UNTRAINED = "no trained token"


@dataclass
class SourceReport:
    """One source: its format and why, rows read and dropped (reason -> count), lengths of all of them in tokens."""

    name: str
    path: str
    format: str
    evidence: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Human lines."""
        facts = [f"{self.name}: {self.rows:,} rows, format {self.format} ({self.evidence})"]
        facts += [f"  dropped {count:,}: {reason}" for reason, count in sorted(self.dropped.items())]
        if self.dropped[UNTRAINED] > 0.05 * self.rows:
            facts.append(f"  warning: {self.dropped[UNTRAINED] / self.rows:.0%} of the rows have nothing to train on")
        return facts


@dataclass
class LoadReport:
    """Training sources, held-out sources, and the totals of what is left of them."""

    sources: list[SourceReport]
    eval_sources: list[SourceReport] = field(default_factory=list)
    totals: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Human lines."""
        lines = [line for source in self.sources for line in source.lines()]
        for source in self.eval_sources:
            first, *more = source.lines()
            lines += [f"held out: {first}", *more]
        return lines + self.totals


def describe(name: str, documents: Documents) -> str:
    """One line on a set of documents: how many, tokens, how much of them is trained, lengths."""
    tokens, trained = len(documents.input_ids), int(documents.target_counts.sum())
    return (
        f"{name}: {len(documents):,} documents, {tokens:,} tokens, {trained / max(tokens, 1):.1%} trained, "
        f"lengths {spread(documents.lengths)}"
    )


def spread(lengths: "np.ndarray | list[int]") -> str:
    """Smallest, median, 95th percentile and largest."""
    low, median, high, top = np.percentile(np.asarray(lengths), [0, 50, 95, 100], method="nearest")
    return f"{low:,} to {top:,} (median {median:,}, 95 % up to {high:,})"
