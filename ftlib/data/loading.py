"""Config -> tokenised documents for training and evaluation, with a report of what was found and dropped."""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from ftlib.data import sources
from ftlib.data.documents import Documents, SourceInfo
from ftlib.data.examples import Example
from ftlib.data.formats import choose_shape, read_example
from ftlib.data.masks import Tokenizer, tokenize
from ftlib.data.packing import shuffled
from ftlib.data.report import UNTRAINED, LoadReport, SourceReport, describe, spread
from ftlib.errors import UserError
from ftlib.sections import Data, Source

HELD_OUT = "held_out"
MOST_BAD_ROWS = 1000  # reading stops here: the whole file is wrong


@dataclass
class Datasets:
    """What a run trains on, the named sets it is evaluated on, and what loading found."""

    train: Documents
    eval: dict[str, Documents]
    report: LoadReport


@dataclass
class _Part:
    """Documents of one source while they are collected."""

    report: SourceReport
    ids: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def load(cfg: Data, tokenizer: Tokenizer, *, seed: int) -> Datasets:
    """Read, tokenise and mask every source of `cfg`, and set the held-out part aside (`seed` picks its rows).

    `cfg.eval` as sources gives one held-out set each, under their names; as a fraction or a number, one called
    `held_out` whose rows are taken from training. UserError names the file and line of what is wrong.
    """
    held_out = isinstance(cfg.eval, (int, float)) and cfg.eval > 0
    parts = [
        _load_source(source, cfg, tokenizer, f"data.sources[{i}]", held_out) for i, source in enumerate(cfg.sources)
    ]
    report = LoadReport([part.report for part in parts])
    train = _gather(parts, [source.weight for source in cfg.sources])
    _check_any(train, report.sources, cfg)
    evals = {}
    if held_out:
        train, evals[HELD_OUT] = _hold_out(train, cfg.eval, seed)
    elif cfg.eval:
        for i, source in enumerate(cfg.eval):
            part = _load_source(source, cfg, tokenizer, f"data.eval[{i}]", True)
            report.eval_sources.append(part.report)
            if part.report.name in evals:
                what = f"two held-out sets are called {part.report.name!r}"
                raise UserError(what, where=f"data.eval[{i}]", fix="give one of them another `name`")
            evals[part.report.name] = _gather([part], [1.0])
            _check_any(evals[part.report.name], [part.report], cfg)
    report.totals = [describe("training", train), *(describe(f"held out ({k})", d) for k, d in evals.items())]
    return Datasets(train, evals, report)


def _load_source(source: Source, cfg: Data, tokenizer: Tokenizer, key: str, keep_examples: bool) -> _Part:
    try:
        file = sources.locate(source.path)
        rows = sources.read(file, source.split)
        first = next(rows)
        shape = choose_shape(first.value, source.format, source.columns, source.roles, key)
    except UserError as error:
        raise UserError(error.what, where=error.where or f"{key}.path", fix=error.fix) from None
    if shape.format != "text" and not tokenizer.chat_template:
        raise UserError(
            f"{file} holds conversations, but the tokenizer has no chat template",
            where="data.template",
            fix="name one: data.template=chatml, or a .jinja file",
        )
    name = source.name or file.name.removesuffix(".gz").rsplit(".", 1)[0]
    part = _Part(SourceReport(name, str(file), shape.format, shape.evidence))
    bad: list[UserError] = []
    for line, value in chain([first], rows):
        part.report.rows += 1
        try:
            example = read_example(value, shape, f"{part.report.path}:{line}")
            ids, trained = tokenize(example, tokenizer)
            kept = _fit(part.report, example.where, ids, trained, cfg)
        except UserError as error:
            bad.append(error)
            if len(bad) == MOST_BAD_ROWS:
                break
            continue
        if kept is not None:
            part.ids.append(kept[0])
            part.trained.append(kept[1])
            part.lines.append(line)
            part.examples += [example] if keep_examples else []
    if bad:
        raise _summary(bad, part.report.rows)
    return part


def _fit(
    report: SourceReport, where: str, ids: np.ndarray, trained: np.ndarray, cfg: Data
) -> tuple[np.ndarray, np.ndarray] | None:
    """The document as it is kept, or None if it is dropped (and counted)."""
    report.lengths.append(len(ids))
    if len(ids) > cfg.seq_len and trained[1:].any():
        if cfg.overlong == "error":
            raise UserError(
                f"{len(ids):,} tokens are more than data.seq_len={cfg.seq_len:,}",
                where=where,
                fix="raise data.seq_len, or set data.overlong to drop or truncate",
            )
        if cfg.overlong == "drop":
            report.dropped[f"longer than data.seq_len={cfg.seq_len:,} tokens"] += 1
            return None
        ids, trained = ids[: cfg.seq_len], trained[: cfg.seq_len]
        if not trained[1:].any():
            report.dropped["no trained token left after truncation"] += 1
            return None
    if not trained[1:].any():
        report.dropped[UNTRAINED] += 1
        return None
    return ids, trained


def _gather(parts: list[_Part], weights: list[float]) -> Documents:
    counts = [len(part.ids) for part in parts]
    rows = ((ids, mask) for part in parts for ids, mask in zip(part.ids, part.trained, strict=True))
    examples = [example for part in parts for example in part.examples]
    return Documents.from_rows(
        rows,
        sources=[SourceInfo(p.report.name, p.report.path, weight) for p, weight in zip(parts, weights, strict=True)],
        source_ids=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        lines=np.array([line for part in parts for line in part.lines], np.int32),
        examples=examples or None,
    )


def _check_any(documents: Documents, reports: list[SourceReport], cfg: Data) -> None:
    if len(documents):
        return
    dropped = [f"{count:,} {reason}" for report in reports for reason, count in sorted(report.dropped.items())]
    lengths = [length for report in reports for length in report.lengths]
    raise UserError(
        f"all {len(lengths):,} rows were dropped: {'; '.join(dropped)}. Lengths seen: {spread(lengths)} tokens",
        where=", ".join(report.path for report in reports),
        fix=f"raise data.seq_len (now {cfg.seq_len:,}), or look at the weights and roles of the messages",
    )


def _hold_out(documents: Documents, amount: float, seed: int) -> tuple[Documents, Documents]:
    """Training and held-out documents, disjoint; which ones depends on `seed` and their number alone."""
    if amount >= 1 and amount != int(amount):
        raise UserError(
            f"{amount} is no number of rows", where="data.eval", fix="a fraction below 1, or a whole number"
        )
    count = int(amount) if amount >= 1 else max(1, round(amount * len(documents)))
    if count >= len(documents):
        raise UserError(
            f"holding out {count:,} of {len(documents):,} rows leaves none to train on",
            where="data.eval",
            fix="hold out fewer, or add rows",
        )
    chosen = np.zeros(len(documents), bool)
    chosen[shuffled(len(documents), seed, 3)[:count]] = True
    return documents.select(~chosen, keep_examples=False), documents.select(chosen)


def _summary(bad: list[UserError], rows: int) -> UserError:
    """One error for all bad rows of a source: the first in full, the next two in short."""
    first, more = bad[0], bad[1:3]
    if not more:
        return first
    few = "; ".join(f"{error.where}: {error.what}" for error in more)
    what = f"{first.what}\n{len(bad):,} of {rows:,} rows read have a problem, the next: {few}"
    return UserError(what, where=first.where, fix=first.fix)
