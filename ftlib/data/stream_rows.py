"""Rows of endless sources: read forward in blocks, tokenised, mixed by tokens, packed. Nothing here knows of processes.

A run has as many *lanes* as packed rows in an optimizer step. Lane i makes row i of every step and reads rows i,
i + lanes, i + 2 * lanes … of each source, so that what it makes depends on the settings and i alone. A lane's position
is a few numbers; whoever continues it makes the same tokens.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftlib.data import thinking
from ftlib.data.examples import Shape
from ftlib.data.files import File, read_file
from ftlib.data.formats import read_examples
from ftlib.data.masks import Masked, Tokenizer, tokenize
from ftlib.data.packing import shuffled
from ftlib.data.pieces import RemoteFile
from ftlib.data.rows import Start
from ftlib.errors import UserError
from ftlib.layers.batch import IGNORED, Piece
from ftlib.sections import Data
from ftlib.sections.stream import Mix


@dataclass(frozen=True)
class StreamSource:
    """Files of one source in order; the first `skip` rows are held out."""

    name: str
    files: tuple[File, ...]
    shape: Shape
    weight: float
    skip: int = 0

    @property
    def versions(self) -> list[str]:
        """What its remote files were when they were found, in their order."""
        return [file.version for file in self.files if isinstance(file, RemoteFile)]


@dataclass(frozen=True)
class StreamPlan:
    """All that decides which tokens come in which order."""

    sources: tuple[StreamSource, ...]
    tokenizer: Tokenizer
    cfg: Data
    lanes: int
    block: int  # rows of one lane that are shuffled among each other
    max_documents: int
    seed: int
    vocab: int
    mix: tuple[Mix, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the order of tokens; shares of sources may change when a run is continued. Of remote
        files the loader's position knows more."""
        files = [[s.name, s.skip, s.shape.format, _sizes(s.files)] for s in self.sources]
        settings = [self.block, self.max_documents, self.cfg.train_on, self.cfg.train_on_end, self.cfg.thinking]
        text = json.dumps([files, settings, self.tokenizer.fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()

    def weights(self, step: int) -> list[float]:
        """Shares of the sources at a step, from 1; they sum to 1."""
        own = [source.weight for source in self.sources]
        points = [(1, own)] if not self.mix or self.mix[0].step > 1 else []
        for mix in self.mix:
            named = [mix.weights.get(source.name, weight) for source, weight in zip(self.sources, own, strict=True)]
            points.append((mix.step, named))
        steps = [at for at, _ in points]
        found = [float(np.interp(step, steps, [_share(w, i) for _, w in points])) for i in range(len(own))]
        return found


def _sizes(files: Sequence[File]) -> list[list]:
    return [[file.name, file.stat().st_size] for file in files if not isinstance(file, RemoteFile)]


def _share(weights: Sequence[float], index: int) -> float:
    return weights[index] / sum(weights)


@dataclass(frozen=True)
class Packed:
    """One packed row: pieces of documents, tokens taken of each source, and the lane's position behind it."""

    pieces: list[Piece]
    taken: list[int]
    state: dict[str, Any]

    @property
    def targets(self) -> int:
        """Labels that are not -100."""
        return sum(int((labels != IGNORED).sum()) for _, labels, *_ in self.pieces)

    @property
    def weight(self) -> float:
        """The sum of their weights; an int where no piece has weights."""
        return sum(
            float(own[0].sum(dtype=np.float64)) if own else int((labels != IGNORED).sum())
            for _, labels, *own in self.pieces
        )


@dataclass
class Reader:
    """Blocks of rows of one source for some lanes, read forward once for all of them.

    Block b of an epoch is rows b * lanes * block and following; lane i has every lanes-th of them. What a lane behind
    the others still needs is kept. `start` is the first (epoch, block) that a lane will ask for, `mark` where that one
    begins: a file's number and a `Start`; None at the beginning of an epoch.
    """

    source: StreamSource
    plan: StreamPlan
    own: Sequence[int]
    start: tuple[int, int]
    mark: list[int] | None = None
    _marks: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    _next: tuple[int, int] = field(init=False)
    _rows: Iterator[tuple[str, Any]] | None = None
    _kept: dict[tuple[int, int], dict[int, list]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._next = self.start
        if self.mark is not None:
            self._marks[self.start] = self.mark

    def block(self, epoch: int, number: int, lane: int) -> list[tuple[str, Any]] | None:
        """(`file:line`, row) of a lane's block; None behind the last one of the epoch."""
        if (epoch, number) < min([self._next, *self._kept]):
            self._next, self._rows, self._kept = (epoch, number), None, {}
        while (epoch, number) not in self._kept:
            if epoch < self._next[0]:
                return None
            self._read()
        return self._kept[epoch, number][lane]

    def forget(self, first: tuple[int, int]) -> None:
        """No lane needs blocks before `first` any more."""
        self._kept = {key: rows for key, rows in self._kept.items() if key >= first}
        self._marks = {key: mark for key, mark in self._marks.items() if key >= first}

    def begins(self, epoch: int, number: int) -> list[int] | None:
        """The mark of a block; None if it is not known yet, or the first of an epoch."""
        return self._marks.get((epoch, number))

    def _read(self) -> None:
        epoch, number = self._next
        size = self.plan.lanes * self.plan.block
        if self._rows is None:
            self._rows = self._from(self.source.skip + number * size, self.begins(epoch, number))
        found: dict[int, list] = {lane: [] for lane in self.own}
        count = 0
        for row in self._rows:
            if count % self.plan.lanes in found:
                found[count % self.plan.lanes].append(row)
            count += 1
            if count == size:
                break
        if count:
            self._kept[epoch, number] = found
        if count == size:
            self._next = epoch, number + 1
            self._marks[self._next] = self.mark
        else:
            self._next, self._rows = (epoch + 1, 0), None

    def _from(self, first: int, mark: list[int] | None) -> Iterator[tuple[str, Any]]:
        """Rows from number `first` on, which is at `mark`; files before it are not opened."""
        at, begin, start = 0, 0, Start()
        if mark is not None:
            begin, start = mark[0], Start(*mark[1:])
            at = first - start.rows
        for number, file in enumerate(self.source.files[begin:], begin):
            count = start.rows
            for row in read_file(file, start):
                count += 1
                if at + count > first:
                    self.mark = [number, count, row.line, row.end]
                    yield f"{file}:{row.line}", row.value
            at, start = at + count, Start()


def first_state(plan: StreamPlan, lane: int) -> dict[str, Any]:
    """Where a lane begins. Lanes owe different sources the most, so that the first step is mixed too."""
    weights = plan.weights(1)
    owed = [w * plan.cfg.seq_len * ((lane * 0.618034 + i / len(weights)) % 1) for i, w in enumerate(weights)]
    nowhere = [None] * len(weights)
    return {"rows": 0, "owed": owed, "cursors": [[0, 0, 0] for _ in weights], "marks": nowhere, "open": None}


class Lane:
    """Makes one packed row after the other. `state` continues from a position."""

    def __init__(self, plan: StreamPlan, number: int, readers: Sequence[Reader], state: dict[str, Any] | None = None):
        self.plan, self.number, self.readers = plan, number, readers
        state = first_state(plan, number) if state is None else state
        self.rows, self.owed = state["rows"], list(state["owed"])
        self.cursors = [list(cursor) for cursor in state["cursors"]]  # epoch, block, place in its order
        self.documents: list[Masked] = []
        self.at: tuple[int, int, int] | None = None  # source, document of its row, token
        if state["open"] is not None:
            self.at = tuple(state["open"])
            self.documents = self._documents(self.at[0])

    def row(self) -> Packed:
        """The next packed row."""
        plan, weights = self.plan, self.plan.weights(self.rows + 1)
        pieces: list[Piece] = []
        taken, room = [0] * len(weights), plan.cfg.seq_len
        while room and len(pieces) < plan.max_documents:
            if self.at is None:
                self._open(weights)
            source, document, token = self.at
            ids, trained = self.documents[document]
            piece = _piece(ids, trained, token, token + room)
            pieces.append(piece)
            count = len(piece[0])
            room -= count
            taken[source] += count
            self.owed = [owed + weight * count for owed, weight in zip(self.owed, weights, strict=True)]
            self.owed[source] -= count
            self._advance(source, document, token + count)
        self.rows += 1
        return Packed(pieces, taken, self.state())

    def state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {
            "rows": self.rows,
            "owed": list(self.owed),
            "cursors": [list(cursor) for cursor in self.cursors],
            "marks": [reader.begins(*cursor[:2]) for reader, cursor in zip(self.readers, self.cursors, strict=True)],
            "open": None if self.at is None else list(self.at),
        }

    def _open(self, weights: Sequence[float]) -> None:
        """Go on with the source that is furthest behind its share."""
        able = [i for i, weight in enumerate(weights) if weight > 0]
        source = max(able, key=lambda i: (self.owed[i], -i))
        empty = 0
        while True:
            self.documents = self._documents(source)
            if self.documents:
                self.at = source, 0, 0
                return
            epoch = self.cursors[source][0]
            self._next_row(source)
            empty += self.cursors[source][0] != epoch
            if empty > 1:
                raise _too_small(self.plan.sources[source], self.plan.lanes)

    def _advance(self, source: int, document: int, token: int) -> None:
        if token < len(self.documents[document][0]):
            self.at = source, document, token
        elif document + 1 < len(self.documents):
            self.at = source, document + 1, 0
        else:
            self.at = None
            self._next_row(source)

    def _next_row(self, source: int) -> None:
        cursor, reader = self.cursors[source], self.readers[source]
        cursor[2] += 1
        rows = reader.block(cursor[0], cursor[1], self.number)
        if rows is None:
            cursor[:] = [cursor[0] + 1, 0, 0]
        elif cursor[2] >= len(rows):
            cursor[:] = [cursor[0], cursor[1] + 1, 0]

    def _documents(self, source: int) -> list[Masked]:
        """Documents of the row the cursor stands at; none where it stands behind the end or at an unusable row."""
        epoch, block, at = self.cursors[source]
        rows = self.readers[source].block(epoch, block, self.number)
        if not rows or at >= len(rows):
            return []
        order = shuffled(len(rows), self.plan.seed, source, self.number, epoch, block)
        where, value = rows[order[at]]
        return self._tokenized(source, where, value)

    def _tokenized(self, source: int, where: str, value: Any) -> list[Masked]:
        cfg, found = self.plan.cfg, []
        try:
            if isinstance(value, UserError):
                raise value
            for example in read_examples(value, self.plan.sources[source].shape, where):
                thinking.apply(example, cfg.thinking)
                ids, trained = tokenize(example, self.plan.tokenizer, cfg.train_on_end)
                if trained[1:].any():
                    found.append((ids, trained))
        except UserError:
            if cfg.on_bad_row == "error":
                raise
        check_tokens(max((int(ids.max()) for ids, _ in found), default=0), self.plan.vocab)
        return found


def _too_small(source: StreamSource, lanes: int) -> UserError:
    what = f"source {source.name!r} has no row to train on for each of the {lanes} rows of a step: too little text"
    fix = "look at it with tune doctor; so small a source needs no stream: remove the section, or lower batch.rows"
    if not source.skip:
        return UserError(what, where="data.sources, batch.rows", fix=fix)
    what += f" behind the first {source.skip:,}, which are held out"
    return UserError(what, where="data.eval, data.sources, batch.rows", fix=f"lower data.eval; {fix}")


def check_tokens(highest: int, vocab: int) -> None:
    """UserError if token `highest` is none of the `vocab` that the model has an embedding for."""
    if highest >= vocab:
        raise UserError(
            f"the tokenizer gives token {highest:,}, the model has embeddings for {vocab:,} tokens",
            where="tokenizer.path",
            fix="use the tokenizer that belongs to the model",
        )


def _piece(ids: np.ndarray, trained: np.ndarray, start: int, stop: int) -> Piece:
    """Tokens [start, stop) of a document and their labels (with weights, where its mask is of floats); the last one's
    is what the next piece begins with."""
    stop = min(stop, len(ids))
    labels = np.full(stop - start, IGNORED, np.int32)
    follows = min(stop + 1, len(ids))
    wanted = trained[start + 1 : follows]
    np.copyto(labels[: len(wanted)], ids[start + 1 : follows], where=wanted != 0)
    piece = np.asarray(ids[start:stop], np.int32), labels
    if trained.dtype == bool:
        return piece
    weights = np.zeros(len(labels), np.float32)
    weights[: len(wanted)] = wanted
    return *piece, weights
