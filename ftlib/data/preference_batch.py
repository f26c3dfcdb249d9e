"""Answers in packed rows: which hidden state predicts which token of which answer, and whole pairs in one row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ftlib.data.documents import Document, Documents
from ftlib.data.packing import shuffled
from ftlib.data.preference import sizes
from ftlib.layers.batch import IGNORED, Batch, Layout, from_documents
from ftlib.layers.shared_prefix import SharedPrefix

SHARE_BELOW = 0.8  # share prompts where this part of the tokens is left, or less


@dataclass(eq=False, kw_only=True)
class Answers:
    """Where the K answers of a batch are, in U units: pairs, or single answers. All of them tensors.

    Of the M trained tokens, int64 [M] each: `rows`, the flattened position whose hidden state predicts the token;
    `targets`, the token; `owners`, its answer; `places`, how many trained tokens of the answer stand before it.
    `lengths` float32 [K]: trained tokens of an answer; `ends` int64 [K]: flattened position of its last token.
    `units` int64 [U]: their indices in the data, of mismatched ones as many further on as the data has; `values`
    float32 [U]: margins of pairs, or 1 and 0 for good and bad. The answers of a unit stand together, the chosen first.
    """

    rows: Tensor
    targets: Tensor
    owners: Tensor
    places: Tensor
    lengths: Tensor
    ends: Tensor
    units: Tensor
    values: Tensor

    def each(self, move: Callable[[Tensor], Tensor]) -> "Answers":
        """The same with every tensor moved."""
        return Answers(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(eq=False)
class AnswerBatch(Batch):
    """A batch whose documents end in answers. `labels` are all -100: only `answers.rows` need the head.

    `mismatched`: prompts with the answer of another unit behind them, one a unit, in rows of their own.
    """

    answers: Answers | None = None
    mismatched: "AnswerBatch | None" = None

    def _each(self, move: Callable[[Tensor], Tensor], layout: Layout) -> "AnswerBatch":
        tensors = (move(t) for t in (self.input_ids, self.labels, self.position_ids))
        return AnswerBatch(*tensors, layout, self.target_tokens, self.tokens, answers=self.answers.each(move))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AnswerBatch":
        """The same batch on `device`."""
        moved = super().to(device, non_blocking)
        moved.mismatched = self.mismatched and self.mismatched.to(device, non_blocking)
        return moved

    def pin_memory(self) -> "AnswerBatch":
        """The same batch in page-locked memory."""
        moved = super().pin_memory()
        moved.mismatched = self.mismatched and self.mismatched.pin_memory()
        return moved


@dataclass(frozen=True)
class Piece:
    """One answer behind its prompt: `ids` int32 [n]; the hidden states at places `rows` predict `targets`, both [m]."""

    ids: np.ndarray
    rows: np.ndarray
    targets: np.ndarray


# One document, and of each answer in it: places of the hidden states that predict it, its tokens, place of its end.
Packed = tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, int]]]


class Preferences:
    """Units of a data set as the loader's documents: pairs, rated answers, or texts whose steps have a class.

    `documents` are what `data.load` gives. `mismatched`: also make, for each unit, its prompt with the answer of
    another unit, which an order drawn from `seed` names (kto's estimate of how far the policy is from its reference).
    `shared`: both answers of a pair stand behind one copy of their prompt (ftlib.layers.shared_prefix).
    """

    def __init__(
        self,
        documents: Documents,
        *,
        mismatched: bool = False,
        seed: int = 0,
        seq_len: int = 0,
        shared: bool | Literal["auto"] = False,
    ) -> None:
        self.documents, self.mismatched = documents, mismatched
        self.prompts, self.firsts = documents.pieces[:, :2].astype(np.int64).T
        self.values = documents.pieces[:, 2].astype(np.float32)
        seconds = np.where(self.firsts > 0, documents.lengths - self.prompts - self.firsts, 0)
        self.answers = 2 if (seconds > 0).any() else 1  # of a unit
        self.lengths = sizes(documents.lengths, documents.pieces)
        stored = self.prompts + self.firsts + seconds
        pays = self.answers == 2 and stored.sum() < SHARE_BELOW * self.lengths.sum()
        self.shared = self.answers == 2 and (pays if shared == "auto" else shared)
        self.lengths = stored if self.shared else self.lengths
        longest = int(np.argmax(self.prompts / stored)) if self.shared else 0  # prompt, beside its answers
        self.share = (int(self.prompts[longest]), int(stored[longest])) if self.shared else (0, 1)
        order = shuffled(len(documents), seed, 4)
        self.other = np.empty(len(order), np.int64)
        self.other[order] = np.roll(order, -1)
        if mismatched:
            self.lengths = np.maximum(self.lengths, np.minimum(self.prompts + self.firsts[self.other], seq_len))

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def target_counts(self) -> np.ndarray:
        """Trained tokens of each unit, int64 [n]."""
        return self.documents.target_counts

    @property
    def target_weights(self) -> np.ndarray:
        """The same: answers that are compared have no weights."""
        return self.documents.target_counts

    @property
    def fingerprint(self) -> str:
        """Equal for units that give equal batches."""
        return self.documents.fingerprint

    @property
    def max_token_id(self) -> int:
        """Largest token id."""
        return self.documents.max_token_id

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of an epoch before shuffling (`Documents.of_epoch`)."""
        return self.documents.of_epoch(seed, epoch)

    def pieces(self, index: int) -> list[Piece]:
        """The answers of a unit, each behind the prompt."""
        ids, trained = self.documents.masked(index)
        prompt, end = self.prompts[index], self.prompts[index] + self.firsts[index]
        if end == prompt:  # steps: the classes stand behind the text
            return [Piece(ids[:prompt], np.flatnonzero(trained[:prompt]), ids[prompt:])]
        found = [_answer(ids[:end], trained[:end])]
        if len(ids) > end:
            found.append(_answer(np.append(ids[:prompt], ids[end:]), np.append(trained[:prompt], trained[end:])))
        return found

    def with_other_answer(self, index: int, seq_len: int) -> list[Piece]:
        """The prompt of a unit with the answer of another; its end is cut off where a row ends."""
        own, other = self.documents.masked(index), self.documents.masked(self.other[index])
        prompt, start = self.prompts[index], self.prompts[self.other[index]]
        end = start + self.firsts[self.other[index]]
        ids, trained = (np.append(a[:prompt], b[start:end])[:seq_len] for a, b in zip(own, other, strict=True))
        return [_answer(ids, trained)]

    def shown(self, index: int) -> list[Document]:
        """Each answer of a unit as a document, for people: behind its source stands what is said of it."""
        documents, source = [], self.documents[index].source
        for piece, said in zip(self.pieces(index), self._said(index), strict=True):
            labels = np.full(len(piece.ids), IGNORED, np.int32)
            labels[piece.rows if self.firsts[index] else piece.rows - 1] = piece.targets  # a step's own token is shown
            documents.append(Document(piece.ids, labels, index, f"{source}, {said}"))
        return documents

    def _said(self, index: int) -> list[str]:
        """What the data say of each answer of a unit, or of the steps of its only one."""
        if self.answers == 2:
            margin = f", better by {self.values[index]:g}" if self.values[index] else ""
            return [f"chosen{margin}", "rejected"]
        if not self.firsts[index]:
            return [", ".join("right" if label else "wrong" for label in self.pieces(index)[0].targets)]
        return ["good" if self.values[index] else "bad"]

    def batch(self, rows: Sequence[Sequence[int]], seq_len: int, pad_id: int, max_documents: int) -> AnswerBatch:
        """Rows [len(rows), seq_len] of these units, of which one holds at most `max_documents`."""
        units = np.array([index for row in rows for index in row], np.int64)
        if self.shared:
            made = _collate([[self._behind_one_prompt(i) for i in row] for row in rows], seq_len, pad_id, max_documents)
            self._share(made, rows, max_documents)
        else:
            pieces = [[_alone(piece) for i in row for piece in self.pieces(i)] for row in rows]
            made = _collate(pieces, seq_len, pad_id, max_documents * self.answers)
        made.answers.units, made.answers.values = torch.from_numpy(units), torch.from_numpy(self.values[units])
        if self.mismatched:
            others = [[_alone(piece) for i in row for piece in self.with_other_answer(i, seq_len)] for row in rows]
            made.mismatched = _collate(others, seq_len, pad_id, max_documents)
            made.mismatched.answers.values = made.answers.values
            made.mismatched.answers.units = made.answers.units + len(self)
        return made

    def _behind_one_prompt(self, index: int) -> Packed:
        """Prompt, first answer, second answer: what follows the prompt is predicted by its last token, twice."""
        ids, trained = self.documents.masked(index)
        prompt, end = int(self.prompts[index]), int(self.prompts[index] + self.firsts[index])
        first = np.flatnonzero(trained[:end])
        second = end + np.flatnonzero(trained[end:])
        return ids, [
            (first - 1, ids[first], end - 1),
            (np.where(second == end, prompt - 1, second - 1), ids[second], len(ids) - 1),
        ]

    def _share(self, batch: AnswerBatch, rows: Sequence[Sequence[int]], max_documents: int) -> None:
        """Give a batch of pairs behind one prompt its positions and its layout."""
        (count, length), most = batch.layout.shape, 3 * max_documents + 1
        positions = np.empty((count, length), np.int64)
        ends, parents = [0], []
        for number, row in enumerate(rows):
            at = 0
            for index in row:
                sizes = self.prompts[index], self.firsts[index], self.lengths[index] - self.prompts[index]
                prompt, first, rest = (int(size) for size in sizes)
                parents += [len(parents)] * 3  # the prompt itself, and two answers that continue it
                for begins, size in ((0, prompt), (prompt, first), (prompt, rest - first)):
                    positions[number, at : at + size] = np.arange(begins, begins + size)
                    at += size
                    ends.append(number * length + at)
            if at < length:
                positions[number, at:] = np.arange(length - at)
                parents.append(len(parents))
                ends.append((number + 1) * length)
        cu_seqlens = np.full(count * most + 1, count * length, np.int32)
        cu_seqlens[: len(ends)] = ends
        parents = np.append(parents, np.arange(len(parents), count * most)).astype(np.int32)
        batch.position_ids = torch.from_numpy(positions)
        extent = np.array((len(ends) - 1, positions.max() + 1), np.int32)  # an answer reads its prompt, too
        part, whole = self.share  # at most so much of any row is read by the prompts and by two answers each
        most_keys = count * length + 2 * count * length * part // whole
        batch.layout = SharedPrefix(
            torch.from_numpy(cu_seqlens), length, (count, length), "shared_prefix", torch.from_numpy(extent),
            most_keys=most_keys, parents=torch.from_numpy(parents), positions=batch.position_ids,
        )  # fmt: skip


def _answer(ids: np.ndarray, trained: np.ndarray) -> Piece:
    rows = np.flatnonzero(trained[1:])
    return Piece(ids, rows, ids[rows + 1])


def _alone(piece: Piece) -> Packed:
    return piece.ids, [(piece.rows, piece.targets, len(piece.ids) - 1)]


def _collate(rows: list[list[Packed]], seq_len: int, pad_id: int, most: int) -> AnswerBatch:
    """Rows of documents, at most `most` in one; whose units the answers are is left open."""
    placed = [[(ids, np.full(len(ids), IGNORED)) for ids, _ in row] for row in rows]
    batch = from_documents(placed, seq_len, pad_id, most)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    ends = []
    for number, row in enumerate(rows):
        at = number * seq_len
        for ids, answers in row:
            for places, targets, end in answers:
                found.append((at + places, targets))
                ends.append(at + end)
            at += len(ids)
    lengths = np.array([len(targets) for _, targets in found], np.int64)
    empty = [np.empty(0, np.int64)]
    arrays = {
        "rows": np.concatenate(empty + [at for at, _ in found]),
        "targets": np.concatenate(empty + [targets for _, targets in found]).astype(np.int64),
        "owners": np.repeat(np.arange(len(lengths)), lengths),
        "places": np.concatenate(empty + [np.arange(length) for length in lengths]),
        "lengths": lengths.astype(np.float32),
        "ends": np.array(ends, np.int64),
        "units": np.empty(0, np.int64),
        "values": np.empty(0, np.float32),
    }
    answers = Answers(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    parts = (batch.input_ids, batch.labels, batch.position_ids, batch.layout)
    return AnswerBatch(*parts, int(lengths.sum()), batch.tokens, answers=answers)
