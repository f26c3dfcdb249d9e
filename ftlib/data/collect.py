"""One source -> tokenised documents: rows are read, masked and fitted here or in worker processes, in their order."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.data import preference, sources, thinking
from ftlib.data.examples import Example, Shape, nested, shown
from ftlib.data.formats import FORMATS, choose_shape, kind, read_examples, unused
from ftlib.data.masks import Masked, Tokenizer, tokenize_all
from ftlib.data.preference import KINDS, Wanted
from ftlib.data.report import BROKEN, LISTED, RENDERED, UNTRAINED, SourceReport
from ftlib.data.store import MemoryWriter, Pieces
from ftlib.errors import UserError
from ftlib.sections import Data, Source

MOST_NAMED = 8  # columns that are not used
MOST_BAD_ROWS = 1000  # reading stops here: the whole file is wrong
CHUNK = 256  # rows that are tokenised together, and that a worker gets at a time
THREADS = "TOKENIZERS_PARALLELISM"  # a switch of the tokenizers library
TEMPLATE_FREE = ("text", "segments", "pretokenized")
_USES = {
    "train": "answers to imitate, and nothing says how good they are",
    "preference": "preference data (chosen and rejected), which is not trained on here",
    "unpaired": "preference data (answers with a label), which is not trained on here",
    "stepwise": "steps with labels for a reward model, which are not trained on here",
    "prompt": "prompts without answers, so there is nothing to imitate",
    "evaluation": "references for an evaluation, which are not trained on",
}


_LEARN = {  # which recipe does, of what is not for the one that was asked
    "train": "recipes/lora_sft.py learns",
    "preference": "recipes/dpo.py or recipes/reward.py (reward.kind=pairs) learns",
    "unpaired": "recipes/dpo.py with dpo.loss=kto (or bco) learns",
    "stepwise": "recipes/reward.py with reward.kind=steps learns",
    "prompt": "recipes/grpo.py, given rewards, learns",
}
_NEEDS = {
    "train": "messages, answers or text",
    "pairs": "`chosen` and `rejected`",
    "rated": "`chosen` and `rejected`, or an answer and its `label`",
    "steps": "`completions`, the steps of an answer, and their `labels`",
}


@dataclass(slots=True)
class Outcome:
    """What became of one row: its documents (ids, mask, the record they came from, the pieces of answers), what was
    dropped, or its error."""

    file_id: int
    line: int
    documents: list[tuple[np.ndarray, np.ndarray, Example | None, Pieces | None]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    error: UserError | None = None
    unwritten: int = 0  # messages whose reasoning the template left out


@dataclass
class Job:
    """How the rows of one source are tokenised."""

    shape: Shape
    tokenizer: Tokenizer
    cfg: Data
    files: list[Path]
    keep_examples: bool
    wanted: Wanted = Wanted()

    def row(self, file_id: int, line: int, value: dict | UserError) -> Outcome:
        """One row to the end."""
        return self.rows([(file_id, line, value)])[0]

    def rows(self, chunk: Sequence[tuple[int, int, dict | UserError]]) -> list[Outcome]:
        """Many rows, in their order."""
        outcomes = [Outcome(file_id, line) for file_id, line, _ in chunk]
        waiting: list[tuple[Outcome, Example]] = []
        for done, (_, _, value) in zip(outcomes, chunk, strict=True):
            try:
                if isinstance(value, UserError):
                    raise value
                waiting += [(done, example) for example in self.read(done, value)]
            except UserError as error:
                done.error = error
        masked = tokenize_all([example for _, example in waiting], self.tokenizer, self.cfg.train_on_end)
        for (done, example), found in zip(waiting, masked, strict=True):
            try:
                if isinstance(found, UserError):
                    raise found
                kept = example if self.keep_examples else None
                done.documents += [(*piece, kept, None) for piece in self.fit(done, example.where, *found)]
                done.unwritten += example.unwritten
            except UserError as error:
                done.error = done.error or error
        for done in outcomes:
            if done.error is not None:
                done.documents = []
        return outcomes

    def read(self, done: Outcome, value: dict) -> list[Example]:
        """The records of a row that are still to be tokenised; answers of preferences are so at once."""
        examples = read_examples(value, self.shape, f"{self.files[done.file_id]}:{done.line}")
        if not examples:
            done.dropped.append(f"format {self.shape.format} made nothing of it")
        for example in examples:
            if self.wanted.kind == "train":
                thinking.apply(example, self.cfg.thinking)
                if self.shape.format == "completion" and example.messages is not None:
                    done.changed.append(RENDERED)
                continue
            kept = example if self.keep_examples else None
            done.documents += [(u.ids, u.trained, kept, u.pieces) for u in self.units(done, example)]
            done.unwritten += example.unwritten
        return examples if self.wanted.kind == "train" else []

    def units(self, done: Outcome, example: Example) -> Iterator[preference.Unit]:
        """The answers of a record that are kept; what is dropped or changed is counted."""
        for found in preference.units(example, self.tokenizer, self.cfg, self.wanted):
            if isinstance(found, preference.Unit):
                done.lengths.append(found.size)
                found, change = preference.fit(found, self.cfg, example.where)
                done.changed += [change] if change else []
            if isinstance(found, str):
                done.dropped.append(found)
            else:
                yield found

    def fit(self, done: Outcome, where: str, ids: np.ndarray, trained: np.ndarray) -> list[Masked]:
        """The documents that are kept of one; what is dropped or changed is counted."""
        done.lengths.append(len(ids))
        most = self.cfg.seq_len
        if not trained[1:].any():
            done.dropped.append(UNTRAINED)
            return []
        if len(ids) <= most:
            return [(ids, trained)]
        if self.cfg.overlong == "error":
            raise UserError(
                f"{len(ids):,} tokens are more than data.seq_len={most:,}",
                where=where,
                fix="raise data.seq_len, or set data.overlong to drop, truncate or split",
            )
        if self.cfg.overlong == "drop":
            done.dropped.append(f"longer than data.seq_len={most:,} tokens")
            return []
        ends = [most] if self.cfg.overlong == "truncate" else range(most, len(ids) + most, most)
        pieces = [(ids[end - most : end], trained[end - most : end]) for end in ends]
        pieces = [piece for piece in pieces if piece[1][1:].any()]
        if not pieces:
            done.dropped.append("no trained token left after truncation")
        else:
            verb = "truncated to" if self.cfg.overlong == "truncate" else "split at"
            done.changed.append(f"{verb} data.seq_len={most:,} tokens")
        return pieces


def opened(
    source: Source, cfg: Data, files: list[Path], key: str
) -> tuple[Shape, dict[str, Any], Iterator[sources.Place]]:
    """The shape of a source, its first row that can be read, and all its rows. UserError where they fit no format."""
    try:
        places = sources.read_all(files, source.split)
        seen: list[sources.Place] = []
        first = None
        for place in places:  # of a broken file the first row that can be read
            seen.append(place)
            if not isinstance(place.row.value, UserError):
                first = place.row.value
                break
            if cfg.on_bad_row == "error" or len(seen) == MOST_BAD_ROWS:
                raise place.row.value
        if first is None:
            raise seen[0].row.value
        shape = choose_shape(first, source.format, source.columns, source.roles, key, cfg.train_on)
        shape = replace(shape, evidence=shape.evidence + _left_out(first, shape))
    except UserError as error:
        if error.where == key:  # of its columns
            error.what = f"{files[0]}: {error.what}"
        raise sources.told(error, key) from None
    return shape, first, chain(seen, places)


def _left_out(row: dict[str, Any], shape: Shape) -> str:
    """What a row has that is not trained on, so that a text in a column of an unknown name is not lost unseen."""
    names = unused(row, shape)
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    classes = " (classification is not trained here)" if shape.format == "text" and "label" in names else ""
    return f"; not used: {', '.join(names[:MOST_NAMED])}{more}{classes}"


def find_shape(
    source: Source, cfg: Data, files: list[Path], tokenizer: Tokenizer, key: str, wanted: Wanted = Wanted()
) -> tuple[Shape, Iterator[sources.Place]]:
    """The shape of a source, and all its rows. UserError if it cannot be trained on."""
    shape, first, places = opened(source, cfg, files, key)
    kinds = KINDS[wanted.kind]
    if kind(shape.format, wanted.kind) not in (*kinds, wanted.kind):
        fits = [name for name in FORMATS if kind(name) in kinds and FORMATS[name].match(first, source.columns)]
        fix = f"name another format: {key}.format={fits[0]}" if fits else f"give rows with {_NEEDS[wanted.kind]}"
        found = kind(shape.format)
        fix += f"; {_LEARN[found]} from these" if found in _LEARN else ""
        what = f"format {shape.format} ({shape.evidence}): these are {_USES[found]}"
        if wanted.kind == "rated" and (label := first.get(source.columns.get("label", "label"))) is not None:
            fix = f"write true or false for `label`, here: {shown(label)}"
        raise UserError(what, where=key, fix=fix)
    plain = shape.format in TEMPLATE_FREE or (
        "completion" in shape.columns and isinstance(nested(first, shape.columns).get(shape.column("completion")), str)
    )
    if not plain and not tokenizer.chat_template:
        raise UserError(
            f"{files[0]} holds conversations, but the tokenizer has no chat template",
            where="data.template",
            fix="name one: data.template=chatml, or a .jinja file",
        )
    return shape, places


def collect(job: Job, places: Iterable[sources.Place], report: SourceReport, writer: MemoryWriter) -> None:
    """Tokenise every row into `writer` and count in `report`. UserError for the bad rows, unless they are skipped."""
    bad: list[UserError] = []
    numbers = {file: number for number, file in enumerate(job.files)}
    rows = ((numbers[place.file], place.row.line, place.row.value) for place in places)
    for done in _outcomes(job, rows):
        report.rows += 1
        if done.error is not None:
            bad.append(done.error)
            if job.cfg.on_bad_row == "error" and len(bad) == MOST_BAD_ROWS:
                break
            continue
        report.lengths.extend(done.lengths)
        report.dropped.update(done.dropped)
        report.changed.update(done.changed)
        report.unwritten += done.unwritten
        for ids, trained, example, pieces in done.documents:
            writer.add(ids, trained, done.file_id, done.line, example, pieces)
    if bad and job.cfg.on_bad_row == "error":
        raise _summary(bad, report.rows)
    if bad:
        report.dropped[BROKEN] = len(bad)
    if job.cfg.on_bad_row == "report":
        report.bad = [f"{error.where}: {error.what}" for error in bad[:LISTED]]


_job: Job | None = None  # of a worker process


def _outcomes(job: Job, rows: Iterator[tuple[int, int, Any]]) -> Iterator[Outcome]:
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    if job.cfg.workers < 1:
        with _threads():
            for chunk in chunks:
                yield from job.rows(chunk)
        return
    global _job
    _job = job
    # Forked, so that a tokenizer need not be sent; nothing of CUDA lives yet when data are loaded.
    with multiprocessing.get_context("fork").Pool(job.cfg.workers, _start) as pool:
        waiting = []
        for chunk in chunks:
            waiting.append(pool.apply_async(_work, (chunk,)))
            if len(waiting) > 2 * job.cfg.workers:  # memory stays bounded
                yield from _unpacked(*waiting.pop(0).get())
        for result in waiting:
            yield from _unpacked(*result.get())
    _job = None


@contextmanager
def _threads() -> Iterator[None]:
    """All cores for the tokenizer's library here; processes that are forked later must not count on its threads."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = before or "true"
    try:
        yield
    finally:
        os.environ[THREADS] = before or "false"


def _start() -> None:
    os.environ[THREADS] = "false"


def _work(rows: Sequence[tuple[int, int, Any]]) -> tuple[list[Outcome], np.ndarray, np.ndarray]:
    """Outcomes with lengths in place of arrays, and all ids and masks end to end: two arrays to send, not thousands."""
    outcomes = _job.rows(rows)
    ids, trained = [np.empty(0, np.int32)], [np.empty(0, bool)]
    for done in outcomes:
        ids += [document[0] for document in done.documents]
        trained += [document[1] for document in done.documents]
        done.documents = [(len(document[0]), None, *document[2:]) for document in done.documents]
    return outcomes, np.concatenate(ids), np.concatenate(trained)


def _unpacked(outcomes: list[Outcome], ids: np.ndarray, trained: np.ndarray) -> list[Outcome]:
    at = 0
    for done in outcomes:
        whole = []
        for length, _, *rest in done.documents:
            whole.append((ids[at : at + length], trained[at : at + length], *rest))
            at += length
        done.documents = whole
    return outcomes


def _summary(bad: list[UserError], rows: int) -> UserError:
    """One error for all bad rows of a source: the first in full, the next two in short."""
    first, more = bad[0], bad[1:3]
    if not more:
        return first
    few, problem = "; ".join(f"{error.where}: {error.what}" for error in more), "a problem"
    if all(error.what == first.what for error in bad):  # a broken template is broken for every row: said once
        few, problem = ", ".join((error.where or "").split(" (")[0] for error in more), "this problem"
    what = f"{first.what}\n{len(bad):,} of {rows:,} rows read have {problem}, the next: {few}"
    return UserError(what, where=first.where, fix=first.fix)


def examples(source: Source, key: str = "source") -> tuple[Shape, Iterator[Example]]:
    """The records of a source of any kind, untokenised: for preferences, prompts, references."""
    files = sources.files_of(source)
    places = sources.read_all(files, source.split)
    first = next(places)
    if isinstance(first.row.value, UserError):
        raise first.row.value
    shape = choose_shape(first.row.value, source.format, source.columns, source.roles, key)

    def each() -> Iterator[Example]:
        for file, row in chain([first], places):
            if isinstance(row.value, UserError):
                raise row.value
            yield from read_examples(row.value, shape, f"{file}:{row.line}")

    return shape, each()
