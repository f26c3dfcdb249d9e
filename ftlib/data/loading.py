"""Config -> tokenised documents for training and evaluation, with a report of what was found and dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftlib.data import cache, sources, store
from ftlib.data.collect import Job, collect, find_shape
from ftlib.data.documents import Documents, SourceInfo
from ftlib.data.files import stem
from ftlib.data.masks import Tokenizer
from ftlib.data.packing import shuffled
from ftlib.data.parts import Part
from ftlib.data.preference import EMPTY, Wanted
from ftlib.data.report import BROKEN, UNTRAINED, LoadReport, SourceReport, by_source, describe, mixture, repeats, spread
from ftlib.errors import UserError, about
from ftlib.sections import Data, Source

HELD_OUT = "held_out"


@dataclass
class Datasets:
    """What a run trains on, the named sets it is evaluated on, and what loading found."""

    train: Documents
    eval: dict[str, Documents]
    report: LoadReport


def load(
    cfg: Data, tokenizer: Tokenizer, *, seed: int, prepare: bool = False, wanted: Wanted = Wanted(),
    key: str = "data.sources", files: Sequence[list[Path]] | None = None,
) -> Datasets:  # fmt: skip
    """Read, tokenise and mask every source of `cfg`, and set the held-out part aside (`seed` picks its rows).

    `cfg.eval` as sources gives one held-out set each, under their names; as a fraction or a number, one called
    `held_out` whose rows are taken from training. `prepare`: fetch what is remote anew, and keep all on disk for the
    runs that follow. `wanted`: what a document is, by default a text to imitate; of answers to compare see
    ftlib.data.preference_batch. `key`: of `cfg.sources` in a config; `files`: theirs, where they are known. UserError
    names file and line of what is wrong.
    """
    held_out = isinstance(cfg.eval, (int, float)) and cfg.eval > 0
    loaded = [
        _source(source, cfg, tokenizer, f"{key}[{i}]", held_out, prepare, wanted, files[i] if files else None)
        for i, source in enumerate(cfg.sources)
    ]
    report = LoadReport([found for _, found in loaded])
    train = _documents(loaded, [source.weight for source in cfg.sources], keep_examples=False)
    _check_any(train, report.sources, cfg)
    count, evals, origins = len(train), {}, []
    if cfg.deduplicate:
        first = train.first_of_each
        origins, train = by_source(train, first), train.select(first == np.arange(len(train)))
    deduplicated = count - len(train)
    if held_out:
        train, evals[HELD_OUT] = _hold_out(train, report.sources, cfg, seed)
    elif cfg.eval:
        evals = _eval_sets(cfg, tokenizer, report, prepare, wanted)
    count = len(train)
    if cfg.deduplicate and evals:
        known = np.concatenate([documents.hashes for documents in evals.values()])
        train = train.select(~np.isin(train.hashes, known))
        _check_any(train, report.sources, cfg)
    report.totals = [describe("training", train), *(describe(f"held out ({k})", d) for k, d in evals.items())]
    report.totals += [*repeats(train, evals, deduplicated, count - len(train)), *origins, *mixture(train)]
    return Datasets(train, evals, report)


def _eval_sets(
    cfg: Data, tokenizer: Tokenizer, report: LoadReport, prepare: bool, wanted: Wanted
) -> dict[str, Documents]:
    evals: dict[str, Documents] = {}
    for i, source in enumerate(cfg.eval):
        part, found = _source(source, cfg, tokenizer, f"data.eval[{i}]", True, prepare, wanted)
        report.eval_sources.append(found)
        if found.name in evals:
            what = f"two held-out sets are called {found.name!r}"
            raise UserError(what, where=f"data.eval[{i}]", fix="give one of them another `name`")
        evals[found.name] = _documents([(part, found)], [1.0], keep_examples=True)
        _check_any(evals[found.name], [found], cfg)
    return evals


def _source(
    source: Source, cfg: Data, tokenizer: Tokenizer, key: str, keep_examples: bool, prepare: bool, wanted: Wanted,
    files: list[Path] | None = None,
) -> tuple[Part, SourceReport]:  # fmt: skip
    """Documents of one source: from the cache if they are there, else tokenised, and kept if the config says so."""
    try:
        files = sources.files_of(source, again=prepare) if files is None else files
    except (UserError, OSError) as error:
        raise sources.told(error, key) from None
    path = str(files[0]) if len(files) == 1 else source.path
    name = source.name or (stem(files[0]) if len(files) == 1 else Path(path.rstrip("/*")).name)
    root = cache.folder_of(cfg)
    with about(f"{key}.path"):
        mark = cache.key(source, cfg, files, tokenizer, keep_examples, wanted) if root else None
    folder = root / mark if mark else None
    if folder and (found := _cached(folder, name, path, files)):
        return found
    if folder is None or not (prepare or cache.writes(cfg, files)):
        writer = store.MemoryWriter(map(str, files))
        report = _tokenise(source, cfg, tokenizer, key, keep_examples, files, writer, name, path, wanted)
        return writer.finish(), report
    with cache.only_one(folder):
        if found := _cached(folder, name, path, files):  # by a process that was faster
            return found
        writer = store.FileWriter([str(file) for file in files], folder)
        try:
            report = _tokenise(source, cfg, tokenizer, key, keep_examples, files, writer, name, path, wanted)
            return writer.publish(report.to_json()), report
        finally:
            writer.abandon()


def _cached(folder: Path, name: str, path: str, files: list[Path]) -> tuple[Part, SourceReport] | None:
    if not folder.is_dir():
        return None
    try:
        part, stored = store.read(folder, [str(file) for file in files])
        return part, SourceReport.from_json(name, path, stored)
    except (OSError, ValueError, KeyError):  # cut off by a full disk, or damaged: it is made again
        return None


def _tokenise(
    source: Source, cfg: Data, tokenizer: Tokenizer, key: str, keep_examples: bool, files: list[Path],
    writer: store.MemoryWriter, name: str, path: str, wanted: Wanted,
) -> SourceReport:  # fmt: skip
    shape, places = find_shape(source, cfg, files, tokenizer, key, wanted)
    report = SourceReport(name, path, shape.format, shape.evidence)
    with about(f"{key}.path"):
        collect(Job(shape, tokenizer, cfg, files, keep_examples, wanted), places, report, writer)
    return report


def _documents(loaded: list[tuple[Part, SourceReport]], weights: list[float], keep_examples: bool) -> Documents:
    infos = [SourceInfo(r.name, r.path, weight) for (_, r), weight in zip(loaded, weights, strict=True)]
    return Documents([part for part, _ in loaded], sources=infos, keep_examples=keep_examples)


def _check_any(documents: Documents, reports: list[SourceReport], cfg: Data) -> None:
    if len(documents):
        return
    lengths = [length for report in reports for length in report.lengths]
    raise UserError(
        f"all {sum(r.rows for r in reports):,} rows were dropped: {_lost(reports) or 'they are held out'}. "
        f"Lengths seen: {spread(lengths)} tokens",
        where=", ".join(report.path for report in reports),
        fix=_mend(reports, cfg) or "give other rows than these",
    )


def _lost(reports: list[SourceReport]) -> str:
    """How many rows were dropped, and why."""
    return "; ".join(f"{count:,} {reason}" for report in reports for reason, count in sorted(report.dropped.items()))


def _mend(reports: list[SourceReport], cfg: Data) -> str:
    """What brings back rows that were dropped."""
    fixes, reasons = [], {reason for report in reports for reason in report.dropped}
    if any("data.seq_len" in reason or "truncation" in reason for reason in reasons):
        split = ", or cut them: data.overlong=split" if cfg.overlong == "drop" else ""
        fixes.append(f"raise data.seq_len (now {cfg.seq_len:,}){split}")
    if UNTRAINED in reasons:
        roles = f"data.train_on ({', '.join(cfg.train_on)})"
        fixes.append(f"give messages of {roles} a text, and no `train: false` or weight of 0 to all of them")
    if EMPTY in reasons:
        fixes.append(f"let each answer have a message of data.train_on ({', '.join(cfg.train_on)}) with a text")
    if BROKEN in reasons:
        fixes.append("see what is wrong with the rows: data.on_bad_row=report")
    return "; ".join(fixes)


def _hold_out(
    documents: Documents, reports: list[SourceReport], cfg: Data, seed: int
) -> tuple[Documents, Documents]:
    """Training and held-out documents, disjoint; which ones depends on `seed` and their number alone."""
    count = int(cfg.eval) if cfg.eval >= 1 else max(1, round(cfg.eval * len(documents)))
    if count >= len(documents):
        what = f"holding out {count:,} of {len(documents):,} rows leaves none to train on"
        if lost := _lost(reports):
            what += f"; dropped were {lost}"
        fixes = filter(None, ("hold out fewer, or add rows", _mend(reports, cfg)))
        raise UserError(what, where="data.eval", fix="; ".join(fixes))
    chosen = np.zeros(len(documents), bool)
    chosen[shuffled(len(documents), seed, 3)[:count]] = True
    return documents.select(~chosen, keep_examples=False), documents.select(chosen)
