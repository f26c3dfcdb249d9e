"""What is in a data set, row by row: for `tune doctor`, and for anyone who wants to know before training."""

import csv
import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ftlib.data import sources
from ftlib.data.collect import Job, Outcome, find_shape, opened
from ftlib.data.documents import Documents
from ftlib.data.examples import Shape
from ftlib.data.formats import kind
from ftlib.data.masks import Tokenizer
from ftlib.data.preview import Shown, merged, preview
from ftlib.data.report import UNTRAINED, UNWRITTEN, spread
from ftlib.data.store import MemoryWriter
from ftlib.errors import UserError
from ftlib.sections import Data, Source

LISTED = 20  # broken rows that are printed
KEY = "data.sources[0]"  # what a config would call the data
SHOWN = 5  # rows on the page, rendered with their trained tokens marked
COLUMNS = ("where", "tokens", "trained", "weight", "state", "repeat_of", "held_out")
MOST_WEIGHTS = 8  # that are listed with their counts


@dataclass
class Row:
    """One row of the data: `state` is ok, or why it would not be trained on."""

    where: str
    tokens: int
    trained: int
    state: str = "ok"
    repeat_of: str = ""
    held_out: bool = False
    weight: float = 0.0  # of its trained tokens together: their number, if none has another than 1


@dataclass
class Findings:
    """All rows of a data set, and what they amount to."""

    path: str
    shape: str
    rows: list[Row]
    roles: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[str, Shown]] = field(default_factory=list)
    weights: Counter[float] = field(default_factory=Counter)  # other than 1 -> trained tokens
    unwritten: int = 0  # messages whose reasoning the template left out

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each number."""
        rows = self.rows
        good = [row for row in rows if row.tokens]
        tokens, trained = sum(row.tokens for row in good), sum(row.trained for row in good)
        facts = [("rows", f"{len(rows):,}"), ("format", self.shape), ("tokens", f"{tokens:,}")]
        if good:
            facts.append(("trained", f"{trained:,} ({trained / tokens:.1%})"))
            facts.append(("length of a row", spread([row.tokens for row in good])))
            facts.append(("trained tokens of a row", spread([row.trained for row in good])))
            longest = sorted(good, key=lambda row: -row.trained)[: max(1, len(good) // 100)]
            share = sum(row.trained for row in longest) / max(trained, 1)
            facts += self._weights(trained)
            facts.append(("imbalance", f"the 1 % of rows with most trained tokens hold {share:.0%} of them"))
        if self.roles:
            facts.append(("messages", ", ".join(f"{count:,} {role}" for role, count in self.roles.most_common())))
        if self.unwritten:
            facts.append(("warning", f"the reasoning of {self.unwritten:,} messages {UNWRITTEN}"))
        facts += [(state, f"{count:,} rows") for state, count in self.states().items() if state != "ok"]
        facts.append(("exact repeats", f"{sum(bool(row.repeat_of) for row in rows):,} rows"))
        both = sum(row.held_out for row in rows)
        return [*facts, ("held out as well", f"{both:,} rows")] if both else facts

    def _weights(self, trained: int) -> list[tuple[str, str]]:
        """Of the tokens whose rows give them a weight: how many have which; nothing where all count 1."""
        if not self.weights:
            return []
        most = [f"{weight:.6g}: {count:,}" for weight, count in sorted(self.weights.most_common(MOST_WEIGHTS))]
        more = [f"and {len(self.weights) - len(most):,} others"] if len(self.weights) > len(most) else []
        mean = sum(row.weight for row in self.rows) / trained
        said = f"{self.weights.total():,} trained tokens ({', '.join([*most, *more])}); mean of all {mean:.3g}"
        return [("weights other than 1", said)]

    def states(self) -> Counter[str]:
        """How many rows are in which state; broken ones counted together."""
        return Counter("broken" if row.state.startswith("broken") else row.state for row in self.rows)

    def lines(self) -> list[str]:
        """Human lines: the facts, then the first broken rows."""
        broken = [f"  {row.where}: {row.state}" for row in self.rows if row.state.startswith("broken")]
        more = [f"  … and {len(broken) - LISTED:,} more"] if len(broken) > LISTED else []
        return [self.path, *(f"  {name}: {value}" for name, value in self.facts()), *broken[:LISTED], *more]


def examine(
    path: str, tokenizer: Tokenizer, *, seq_len: int, format: str = "auto", held_out: str | None = None
) -> Findings:
    """Read every row of `path` as training would. UserError where no row can be read at all."""
    shape, places = _opened(path, format)
    if kind(shape.format) != "train":
        from ftlib.data import doctor_answers  # which takes Findings from here

        others = _opened(held_out, format)[1] if held_out else ()
        return doctor_answers.examine(path, shape, places, others, tokenizer, seq_len)
    shape, outcomes, documents = _read(path, tokenizer, seq_len, format)
    rows, first_seen = [], {}
    known = set(_read(held_out, tokenizer, seq_len, format)[2].hashes.tolist()) if held_out else set()
    roles: Counter[str] = Counter()
    weights: Counter[float] = Counter()
    number = 0
    for where, outcome in outcomes:
        if outcome.error is not None:
            rows.append(Row(where, 0, 0, f"broken: {outcome.error.what}"))
        for length in outcome.lengths if outcome.error is None and not outcome.documents else ():
            rows.append(Row(where, length, 0, UNTRAINED))
        if outcome.error is None and not outcome.documents and not outcome.lengths:
            rows += [Row(where, 0, 0, reason) for reason in outcome.dropped]
        for ids, trained, example, *_ in outcome.documents:
            state = "ok" if len(ids) <= seq_len else f"longer than {seq_len:,} tokens"
            row = Row(where, len(ids), int(documents.target_counts[number]), state)
            row.weight = round(documents.target_weights[number].item(), 6)
            row.held_out = int(documents.hashes[number]) in known
            if trained.dtype != bool:
                weights.update(trained[1:][(trained[1:] != 0) & (trained[1:] != 1)].tolist())
            row.repeat_of = first_seen.setdefault(int(documents.hashes[number]), where)
            row.repeat_of = "" if row.repeat_of == where else row.repeat_of
            roles.update(message["role"] for message in example.messages or ())
            rows.append(row)
            number += 1
    chosen = np.linspace(0, len(documents) - 1, min(SHOWN, len(documents)), dtype=int)
    samples = [(documents.where(i), merged(preview(documents, tokenizer, i))) for i in chosen]
    return Findings(path, shape, rows, roles, samples, weights, sum(outcome.unwritten for _, outcome in outcomes))


def _opened(path: str, format: str) -> tuple[Shape, Iterator[sources.Place]]:
    source = Source(path=path, format=format)
    cfg = Data(sources=(source,), on_bad_row="skip")
    try:
        shape, _, places = opened(source, cfg, sources.files_of(source), KEY)
    except UserError as error:
        raise _of_the_argument(error, path) from None
    return shape, places


def _read(
    path: str, tokenizer: Tokenizer, seq_len: int, format: str
) -> tuple[str, list[tuple[str, Outcome]], Documents]:
    source = Source(path=path, format=format)
    cfg = Data(sources=(source,), seq_len=1 << 30, on_bad_row="skip")
    files = sources.files_of(source)
    try:
        shape, places = find_shape(source, cfg, files, tokenizer, KEY)
    except UserError as error:
        raise _of_the_argument(error, path) from None
    job, writer = Job(shape, tokenizer, cfg, files, True), MemoryWriter([str(file) for file in files])
    numbers, outcomes = {file: i for i, file in enumerate(files)}, []
    for file, row in places:
        outcome = job.row(numbers[file], row.line, row.value)
        outcomes.append((f"{file}:{row.line}", outcome))
        for ids, trained, *_ in outcome.documents:
            writer.add(ids, trained, outcome.file_id, outcome.line, None)
    if not any(outcome.documents for _, outcome in outcomes):
        error = next((o.error for _, o in outcomes if o.error), None)
        raise error or UserError(f"{path} has nothing to train on", fix="look at the roles and weights of its messages")
    return f"{shape.format} ({shape.evidence})", outcomes, Documents([writer.finish()], sources=())


def _of_the_argument(error: UserError, path: str) -> UserError:
    """The same mistake where no config is read: what `data.sources[0]` says of DATA is its path or --format."""
    where, fix = error.where, error.fix and error.fix.replace(f"{KEY}.format=", "--format ")
    if where == f"{KEY}.format":
        where = "--format"
    elif where in (KEY, f"{KEY}.path"):
        where = path
    if fix and KEY in fix:
        fix += "; that goes into the config (tune init writes one): here only --format can be named"
    return UserError(error.what, where=where, fix=fix)


def write(found: Findings, folder: Path) -> Path:
    """rows.csv and report.html (no other file, no script, no network) into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, name) for name in COLUMNS] for row in found.rows)
    page = folder / "report.html"
    page.write_text(_page(found), encoding="utf-8")
    return page


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}mark{background:#bfe8c5}.weighted{background:#fbe3a2}"
    ".bar{background:#4a7fb5;height:1rem;min-width:1px}"
)


def _page(found: Findings) -> str:
    facts = "".join(f"<tr><th>{html.escape(n)}<td>{html.escape(v)}" for n, v in found.facts())
    parts = [f"<h1>{html.escape(found.path)}</h1><table>{facts}</table>"]
    lengths = [row.tokens for row in found.rows if row.tokens]
    parts += [f"<h2>Lengths in tokens</h2>{_histogram(lengths)}"] if lengths else []
    bad = [row for row in found.rows if row.state != "ok" or row.repeat_of or row.held_out][:1000]
    if bad:
        cells = "".join(
            f"<tr><td>{html.escape(row.where)}<td>{html.escape(_complaint(row))}" for row in bad
        )
        parts.append(f"<h2>Rows to look at</h2><table><tr><th>row<th>what{cells}</table>")
    if found.samples:
        other = ", those with a weight other than 1 <mark class=weighted>so</mark>" if found.weights else ""
        parts.append(f"<h2>Samples</h2><p>Trained tokens are <mark>marked</mark>{other}.</p>")
    for where, pieces in found.samples:
        text = "".join(_marked(html.escape(t), trained) if trained else html.escape(t) for t, trained in pieces)
        parts.append(f"<h3>{html.escape(where)}</h3><pre>{text}</pre>")
    head = f"<meta charset=utf-8><title>{html.escape(found.path)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _marked(text: str, weight: bool | float) -> str:
    return f"<mark>{text}</mark>" if weight == 1 else f'<mark class=weighted title="weight {weight:.6g}">{text}</mark>'


def _complaint(row: Row) -> str:
    said = [row.state] if row.state != "ok" else []
    said += [f"repeats {row.repeat_of}"] if row.repeat_of else []
    return "; ".join([*said, *(["held out as well"] if row.held_out else [])])


def _histogram(lengths: list[int]) -> str:
    edges = [2**n for n in range(int(np.log2(max(lengths))) + 2)]
    counts, _ = np.histogram(lengths, edges)
    rows = [
        f"<tr><td>{low:,} to {high - 1:,}<td>{count:,}<td style='width:60%'>"
        f"<div class=bar style='width:{100 * count / max(counts):.1f}%'></div>"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return f"<table><tr><th>tokens<th>rows<th>{''.join(rows)}</table>"
