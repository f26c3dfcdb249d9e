"""Packed batches in an order that depends on (seed, epoch) alone: not on ranks, threads or restarts."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np

from ftlib.data.packing import pack, shuffled, width
from ftlib.errors import UserError
from ftlib.layers.batch import MULTIPLE, Batch

AHEAD = 2  # steps made in advance by the loader's thread
COUNTED = 1 << 16  # rows that tell how much is padding: of millions, all take a minute


class Rows(Protocol):
    """What is loaded: Documents, or Preferences. `lengths`, tokens each takes in a row, and the others are [n]."""

    lengths: np.ndarray
    target_counts: np.ndarray
    target_weights: np.ndarray

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray: ...

    def batch(self, rows: list[list[int]], seq_len: int, pad_id: int, max_documents: int) -> Batch: ...


@dataclass(frozen=True)
class Step:
    """One optimizer step's data for this rank. The numbers are over all ranks, known without communication.

    `target_tokens`: labels that are not -100; `target_weight`: the sum of their weights, which is their number where
    rows have no others than 0 and 1, and what a mean is taken over; `tokens`: without padding; `epoch`: epochs seen
    after this step (1.5 is half of the second); `packs`: the documents (indices) in each row of the step, empty for a
    row of padding.
    """

    micro_batches: list[Batch]
    target_tokens: int
    target_weight: float
    tokens: int
    epoch: float
    packs: list[list[int]]


@dataclass
class Plan:
    """Which documents share which row, for every epoch. Thread-safe; the packs of two epochs are kept."""

    documents: Rows
    seq_len: int
    seed: int
    packed: bool = True
    multiple: int = MULTIPLE
    max_documents: int = field(init=False)  # of a row: as the fullest row of epoch 0 has, which binds all epochs
    _packs: dict[int, list[list[int]]] = field(init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        first = self._make(0, None)
        self.max_documents, self._packs = max(map(len, first), default=1), {0: first}

    def packs(self, epoch: int) -> list[list[int]]:
        """Rows of an epoch in order, each a list of document indices."""
        with self._lock:
            if epoch not in self._packs:
                newest = list(self._packs.items())[-1:]
                self._packs = {**dict(newest), epoch: self._make(epoch, self.max_documents)}
            return self._packs[epoch]

    def width(self, rows: list[list[int]]) -> int:
        """Tokens of each row of a micro-batch: `seq_len` where documents are packed, else what its longest one takes.

        A function of the micro-batch alone: the number of ranks does not change it, and ranks that share rows agree.
        """
        return self.seq_len if self.packed else row_width(self.documents, rows, self.seq_len, self.multiple)

    def padding(self, micro_rows: int) -> float:
        """The share of epoch 0's positions that hold no token; of more than `COUNTED` rows, of as many at random."""
        packs = self.packs(0)[:COUNTED]
        micro = [packs[at : at + micro_rows] for at in range(0, len(packs), micro_rows)]
        tokens = sum(int(self.documents.lengths[row].sum()) for row in packs)
        return 1 - tokens / max(1, sum(self.width(rows) * len(rows) for rows in micro))

    def _make(self, epoch: int, max_documents: int | None) -> list[list[int]]:
        members = self.documents.of_epoch(self.seed, epoch)
        if not self.packed:
            return [[index] for index in members[shuffled(len(members), self.seed, epoch)].tolist()]
        packs = pack(self.documents.lengths[members], self.seq_len, self.seed, epoch, max_documents)
        names = members.tolist()
        return [[names[i] for i in row] for row in packs]


@dataclass
class _Maker:
    """Makes one step after the other from a position on. Knows nothing of the loader that consumes them."""

    plan: Plan
    rows: int
    micro_rows: int
    pad_id: int
    rank: int
    ranks: int
    pin: bool
    share: Callable[[Batch], Batch] | None
    epoch: int
    next_pack: int

    def make(self) -> tuple[Step, dict[str, int]]:
        """The next step, and the position after it."""
        packs = self.plan.packs(self.epoch)
        while self.next_pack >= len(packs):  # an epoch of tiny weights may be empty
            self.epoch, self.next_pack = self.epoch + 1, 0
            packs = self.plan.packs(self.epoch)
        rows = packs[self.next_pack : self.next_pack + self.rows]
        self.next_pack += len(rows)
        members = [index for row in rows for index in row]
        seen = self.epoch + self.next_pack / len(packs)
        if self.next_pack == len(packs):
            self.epoch, self.next_pack = self.epoch + 1, 0
        rows += [[] for _ in range(self.rows - len(rows))]
        own = self.rows // self.ranks
        first = self.rank * own
        micro = range(first, first + own, self.micro_rows)
        documents = self.plan.documents
        step = Step(
            [self._batch(rows[at : at + self.micro_rows]) for at in micro],
            int(documents.target_counts[members].sum()),
            documents.target_weights[members].sum().item(),
            int(documents.lengths[members].sum()),
            seen,
            rows,
        )
        return step, {"epoch": self.epoch, "next_pack": self.next_pack}

    def _batch(self, rows: list[list[int]]) -> Batch:
        batch = self.plan.documents.batch(rows, self.plan.width(rows), self.pad_id, self.plan.max_documents)
        batch = batch if self.share is None else self.share(batch)
        return batch.pin_memory() if self.pin else batch


class Loader:
    """Endless iterator of `Step`. Row i of a step is a function of (seed, epoch, i); rank r takes its slice of rows.

    Each rank's rows / ranks rows come as micro batches of `micro_rows`. The last step of an epoch is filled with rows
    of padding, so every rank does the same number of steps. A thread makes steps in advance; the state is the position
    of the next step to be consumed, whatever was made already. `max_documents` is constant for the run, hence so is
    the shape of every tensor of every batch; without `pack` a micro-batch is as wide as its longest document needs, a
    size of `packing.width` (`multiple`: of what every row is a multiple, or `seq_len`). `share`, if given, picks this
    rank's part of each batch.
    """

    def __init__(
        self,
        documents: Rows,
        *,
        seq_len: int,
        rows: int,
        micro_rows: int,
        seed: int,
        pack: bool,
        pad_id: int,
        rank: int = 0,
        ranks: int = 1,
        pin: bool = False,
        share: Callable[[Batch], Batch] | None = None,
        multiple: int = MULTIPLE,
    ) -> None:
        if rows % (micro_rows * ranks):
            near = max(rows // (micro_rows * ranks), 1) * micro_rows * ranks
            raise UserError(
                f"batch.rows={rows} is no multiple of batch.micro_rows={micro_rows} x {ranks} data-parallel ranks "
                "(parallel.dp_replicate x parallel.dp_shard)",
                where="batch.rows",
                fix=f"set batch.rows={near}, or change batch.micro_rows",
            )
        self.plan = Plan(documents, seq_len, seed, pack, multiple)
        if not self.plan.packs(0):
            raise UserError(
                "an epoch has no rows", where="data.sources", fix="raise the weights of the sources, or add rows"
            )
        self._settings = (rows, micro_rows, pad_id, rank, ranks, pin, share)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._start({"epoch": 0, "next_pack": 0})

    @property
    def max_documents(self) -> int:
        """Most documents of a row: give it to `eval_batches` for batches of the same shapes."""
        return self.plan.max_documents

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of an epoch; the same for all unless a source has a fractional weight."""
        return -(-len(self.plan.packs(epoch)) // self._settings[0])

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while len(self._made) <= AHEAD:
            self._made.append(self._pool.submit(self._maker.make))
        step, self._position = self._made.popleft().result()
        return step

    def state_dict(self) -> dict[str, int]:
        """Position of the next step: {"epoch", "next_pack"}."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict` taken at any number of ranks. UserError if the data has no such position."""
        position = {key: state.get(key) for key in ("epoch", "next_pack")}
        if not all(isinstance(value, int) and value >= 0 for value in position.values()):
            raise UserError(f"{state} is no position in the data", fix="resume from another checkpoint")
        packs = len(self.plan.packs(position["epoch"]))
        if position["next_pack"] > packs:
            raise UserError(
                f"the checkpoint stands at row {position['next_pack']} of epoch {position['epoch']}, which has {packs}",
                fix="resume with the data, seq_len and seed the checkpoint was made with",
            )
        self._start(position)

    def _start(self, position: dict[str, int]) -> None:
        # Steps that the thread is still making belong to the old maker: nobody waits for them any more.
        self._made: deque[Future[tuple[Step, dict[str, int]]]] = deque()
        self._position = position
        self._maker = _Maker(self.plan, *self._settings, **position)


def eval_batches(
    documents: Rows,
    seq_len: int,
    micro_rows: int,
    pad_id: int,
    rank: int = 0,
    ranks: int = 1,
    max_documents: int | None = None,
    multiple: int | None = None,
) -> Iterator[Batch]:
    """Every document once over all ranks, packed; the same number of batches on each rank.

    `max_documents` of the training loader gives batches of its shapes, so that compiled code is not compiled again; so
    does `multiple` of one that does not pack. None: every row has `seq_len` tokens.
    """
    packs = pack(documents.lengths, seq_len, 0, 0, max_documents)
    most = max_documents or max(map(len, packs), default=1)
    for start in range(0, len(packs), micro_rows * ranks):
        at = start + rank * micro_rows
        rows = packs[at : at + micro_rows]
        rows += [[] for _ in range(micro_rows - len(rows))]
        wide = seq_len if multiple is None else row_width(documents, rows, seq_len, multiple)
        yield documents.batch(rows, wide, pad_id, most)


def row_width(documents: Rows, rows: list[list[int]], seq_len: int, multiple: int) -> int:
    """Tokens that rows of one micro-batch need, as `packing.width` has them."""
    return width(max(int(documents.lengths[row].sum()) for row in rows), seq_len, multiple)
