"""What loading found: one line a fact, printed before training starts."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftlib.data import preference
from ftlib.data.documents import Documents

UNTRAINED = "no trained token"
BROKEN = "a broken row (data.on_bad_row)"
RENDERED = "a conversation, which the chat template writes"  # of a format whose rows may be plain text as well
LISTED = 1000  # bad rows that are kept by name
UNRENDERED = "is not in what the template renders, so it is not learned: take a data.template that writes it"
UNWRITTEN = f"{UNRENDERED}, or say data.thinking=drop"


@dataclass
class SourceReport:
    """One source: its format and why, rows read and dropped (reason -> count), lengths of all of them in tokens.

    `changed`: rows kept in another form; `bad`: `file:line: what` of the rows that could not be read; `unwritten`:
    messages whose reasoning the template left out.
    """

    name: str
    path: str
    format: str
    evidence: str
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    lengths: Any = field(default_factory=lambda: array("i"))
    bad: list[str] = field(default_factory=list)
    unwritten: int = 0
    cached: bool = False

    def lines(self) -> list[str]:
        """Human lines."""
        known = ", tokenised before" if self.cached else ""
        facts = [f"{self.name}: {counted(self.rows, 'row')}, format {self.format} ({self.evidence}{known})"]
        facts += [f"  dropped {count:,}: {reason}" for reason, count in sorted(self.dropped.items())]
        facts += [f"  {reason}: {count:,}" for reason, count in sorted(self.changed.items()) if reason != RENDERED]
        if 0 < self.changed[RENDERED] < self.rows:
            mixed = f"  warning: {self.changed[RENDERED]:,} of {counted(self.rows, 'row')} hold lists of messages"
            facts.append(f"{mixed}, which the chat template writes; the others are text, trained as it is")
        facts += [f"  {bad}" for bad in self.bad]
        unwritten = f"  warning: the reasoning of {counted(self.unwritten, 'message')} {UNWRITTEN}"
        facts += [unwritten] if self.unwritten else []
        if self.dropped[UNTRAINED] > 0.05 * self.rows:
            facts.append(f"  warning: {self.dropped[UNTRAINED] / self.rows:.0%} of the rows have nothing to train on")
        return facts

    def to_json(self) -> dict[str, Any]:
        """Everything but what `from_json` is told anew."""
        return {
            "format": self.format, "evidence": self.evidence, "rows": self.rows, "dropped": self.dropped,
            "changed": self.changed, "bad": self.bad, "lengths": list(self.lengths[:100_000]),
            "unwritten": self.unwritten,
        }  # fmt: skip

    @classmethod
    def from_json(cls, name: str, path: str, stored: dict[str, Any]) -> "SourceReport":
        """The report of a source that was tokenised before, under its present name and path."""
        stored = {**stored, "lengths": array("i", stored["lengths"])}
        stored |= {key: Counter(stored[key]) for key in ("dropped", "changed")}
        return cls(name, path, **stored, cached=True)


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
    """One line on a set of documents: how many, tokens, how much of them is trained, lengths; of answers as
    `data.seq_len` counts them."""
    lengths, noun, how = documents.lengths, "document", ""
    if documents.compared:
        lengths = preference.sizes(documents.lengths, documents.pieces)
        steps, pairs = (documents.pieces[:, 1] == 0).any(), (lengths > documents.lengths).any()
        noun = "pair" if pairs else "answer" if steps else "rated answer"
        good = int((documents.pieces[:, 2] > 0).sum())
        rated = f" ({good:,} good, {len(lengths) - good:,} bad)"
        how = f" ({preference.BOTH})" if pairs else " in steps" if steps else rated
    tokens, trained = int(lengths.sum(dtype=np.int64)), int(documents.target_counts.sum())
    weighted = ""
    if documents.weighted:
        mean = documents.target_weights.sum() / max(trained, 1)
        weighted = f", {documents.weighted:,} with weights other than 0 and 1 (mean of all trained tokens {mean:.3g})"
    return (
        f"{name}: {counted(len(documents), noun)}{how}{weighted}, {counted(tokens, 'token')}, "
        f"{trained / max(tokens, 1):.1%} trained, lengths {spread(lengths)}"
    )


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def repeats(train: Documents, evals: dict[str, Documents], deduplicated: int, removed: int) -> list[str]:
    """Lines on exact repeats among training documents, and on those that are held out as well."""
    lines = []
    if deduplicated:
        lines.append(f"left out {deduplicated:,} exact repeats (data.deduplicate)")
    if removed:
        lines.append(f"left out {removed:,} training documents that are held out as well (data.deduplicate)")
    again = len(train) - len(np.unique(train.hashes))
    if again:
        share = f"{again:,} of {len(train):,} training documents"
        lines.append(f"{share} are exact repeats: data.deduplicate=true drops them")
    for name, held_out in evals.items():
        both = int(np.isin(held_out.hashes, train.hashes).sum())
        if both:
            lines.append(
                f"warning: {both:,} of {len(held_out):,} documents of {name} are in the training data too, so its loss "
                "says little: data.deduplicate=true leaves them out of training"
            )
    return lines


def by_source(documents: Documents, first: np.ndarray) -> list[str]:
    """Of several sources: how many rows of each repeat rows of which (`first`: `Documents.first_of_each`), and what
    remains."""
    lines, repeated = [], first != np.arange(len(first))
    for number, source in enumerate(documents.sources if len(documents.sources) > 1 else ()):
        own = documents.source_ids == number
        count = int((own & repeated).sum())
        if count:
            origins = dict.fromkeys(documents.source_ids[first[own & repeated]].tolist())
            names = ", ".join("itself" if i == number else documents.sources[i].name for i in origins)
            left = f"{own.sum() - count:,}" if count < own.sum() else "none"
            lines.append(f"  {source.name}: {own.sum():,} rows, {count:,} are repeats of {names}: {left} left")
    return lines


def mixture(train: Documents) -> list[str]:
    """Of several sources, or weighted ones, what an epoch has of each; a warning where that is nothing."""
    lines, sizes, tokens = [], [], []
    for number, source in enumerate(train.sources):
        own = train.source_ids == number
        sizes.append(int(own.sum()))
        tokens.append(train.lengths[own].sum(dtype=np.int64) * source.weight)
        if not sizes[-1]:
            what = f"no row of {source.name} is left to train on, so its weight {source.weight:g} does nothing"
            lines.append(f"warning: {what}: put it before sources whose rows it repeats, or leave it out")
    if all(source.weight == 1 for source in train.sources):
        return lines
    for source, size, amount in zip(train.sources, sizes, tokens, strict=True):
        share = f"{amount / sum(tokens):.1%} of the tokens"
        lines.append(f"  {source.name}: weight {source.weight:g}, {size * source.weight:,.6g} rows an epoch, {share}")
    return lines


def spread(lengths: Any) -> str:
    """Smallest, median, 95th percentile and largest."""
    if not len(lengths):
        return "none"
    low, median, high, top = np.percentile(np.asarray(lengths), [0, 50, 95, 100], method="nearest")
    return f"{low:,} to {top:,} (median {median:,}, 95 % up to {high:,})"
