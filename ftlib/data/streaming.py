"""Training on text as it is read: sources opened, held-out rows set apart, packed batches, a position to resume from.

The position is the state of every lane (ftlib.data.stream_rows). It does not name processes: any number of
data-parallel processes that divides batch.rows continues it to the token.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ftlib.data import pieces, sources
from ftlib.data.collect import CHUNK, TEMPLATE_FREE, Job, Outcome, find_shape
from ftlib.data.documents import Documents
from ftlib.data.examples import Shape
from ftlib.data.files import File, stem
from ftlib.data.loader import AHEAD
from ftlib.data.loading import load
from ftlib.data.masks import Tokenizer
from ftlib.data.pieces import Pieces, RemoteFile
from ftlib.data.remote import cache_folder, is_remote
from ftlib.data.report import UNWRITTEN, LoadReport, SourceReport, describe
from ftlib.data.stream_rows import Packed, StreamPlan, StreamSource, check_tokens
from ftlib.data.stream_workers import Workers, make_lanes, next_rows
from ftlib.errors import UserError
from ftlib.layers.batch import Batch, from_documents
from ftlib.sections import Data, Source
from ftlib.sections.stream import Stream

GIB = 1 << 30
Gather = Callable[[Any], list[Any]]  # JSON-able value of this process -> the values of all, in their order


@dataclass(frozen=True)
class StreamStep:
    """One optimizer step's data for this rank. The numbers are over all ranks; `by_source`: tokens of each source.

    `target_weight`: as of a `Step` (ftlib.data.loader).
    """

    micro_batches: list[Batch]
    target_tokens: int
    target_weight: float
    tokens: int
    by_source: dict[str, int]


@dataclass(frozen=True)
class Streamed:
    """What stands in the place of `Datasets`: sources that are opened and not read."""

    train: StreamPlan
    eval: dict[str, Documents]
    report: LoadReport


def check(data: Data, stream: Stream, steps: int | None, exact_match: int = 0) -> None:
    """UserError for what a stream cannot do."""
    problems = [
        (steps is None, "a stream has no end", "steps", "set steps=N"),
        (not data.pack, "a stream is always packed", "data.pack", "leave it out"),
        (data.deduplicate, "a stream is not searched for repeats", "data.deduplicate", "leave it out"),
        (
            isinstance(data.eval, float) and 0 < data.eval < 1,
            "a share of a stream is not known", "data.eval", "give a number of rows (of each source), or sources",
        ),
        (exact_match > 0, "rows of a stream are not kept to be answered", "eval.exact_match", "set it to 0"),
    ]  # fmt: skip
    for wrong, what, where, fix in problems:
        if wrong:
            raise UserError(what, where=where, fix=fix)
    for i, source in enumerate(data.sources):
        if source.split and "[" in source.split:
            fix = "name whole files in `path`"
            raise UserError("a stream reads whole files", where=f"data.sources[{i}].split", fix=fix)
    away, least = sum(is_remote(source.path) for source in data.sources), pieces.LEAST * pieces.PIECE / GIB
    if stream.cache_gib < away * least:
        what = f"stream.cache_gib={stream.cache_gib:g} is too small for {away} remote sources, read a piece at a time"
        raise UserError(what, where="stream.cache_gib", fix=f"set it to {away * least:g} or more")
    listed = enumerate(data.sources) if stream.mix else ()
    names = [source.name or _name(source, _files(source, stream, f"data.sources[{i}]")) for i, source in listed]
    for i, mix in enumerate(stream.mix):
        where = f"stream.mix[{i}].weights"
        if unknown := set(mix.weights) - set(names):
            fix = f"sources are called {', '.join(names)}; `name` gives one another name"
            raise UserError(f"no source is called {unknown.pop()!r}", where=where, fix=fix)
        if not any(mix.weights.get(name, 1) for name in names):
            raise UserError("all weights are 0", where=where, fix="leave one above 0")


def open_stream(data: Data, stream: Stream, tokenizer: Tokenizer, *, rows: int, seed: int, vocab: int) -> Streamed:
    """Find every source's files and format, and read the held-out rows: a number of `data.eval` is the first rows of
    each source, set apart from training. `rows`: of an optimizer step; `vocab`: tokens the model knows."""
    found, reports = [], []
    held_out = int(data.eval) if isinstance(data.eval, (int, float)) else 0
    listed = [_files(source, stream, f"data.sources[{i}]") for i, source in enumerate(data.sources)]
    ahead = _ahead(stream, listed)
    for i, (source, files) in enumerate(zip(data.sources, listed, strict=True)):
        shape, places = find_shape(source, data, files, tokenizer, f"data.sources[{i}]")
        name = _name(source, files)
        found.append(StreamSource(name, pieces.in_order(files, ahead), shape, source.weight, held_out))
        share = None if stream.mix else source.weight / sum(s.weight for s in data.sources)
        reports.append(_Opened(name, source.path, shape.format, shape.evidence, files, share))
        reports[-1].unwritten = _beginning(shape, data, tokenizer, files, places)
    names = [source.name for source in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two sources are called {double!r}", where="data.sources", fix="give one another `name`")
    block = max(1, stream.buffer // rows)
    limits = (rows, block, stream.max_documents)
    plan = StreamPlan(tuple(found), tokenizer, data, *limits, seed=seed, vocab=vocab, mix=stream.mix)
    if held_out:
        first = f"[:{held_out}]"
        pairs = zip(data.sources, names, strict=True)
        cut = [replace(source, split=f"{source.split or ''}{first}", name=name) for source, name in pairs]
    else:
        cut = [] if isinstance(data.eval, (int, float)) else list(data.eval or ())  # `check` refuses a share
        listed = [_files(source, stream, f"data.eval[{i}]") for i, source in enumerate(cut)]
    evals = _held_out(data, cut, listed, tokenizer, seed, held_out) if cut else {}
    for rows_out in evals.values():
        check_tokens(rows_out.max_token_id, vocab)
    totals = [describe(f"held out ({k})", d) for k, d in evals.items()]
    checked = f"rows of a stream are read as they come: checked are the first {CHUNK} of each source"
    report = LoadReport(reports, totals=[*totals, checked])
    return Streamed(plan, evals, report)


class _Opened(SourceReport):
    """A source of a stream, of which only the beginning was looked at; `share`: None where it changes."""

    def __init__(
        self, name: str, path: str, format: str, evidence: str, files: list[File], share: float | None
    ) -> None:
        super().__init__(name, path, format, evidence)
        self.files, self.share = files, share

    def lines(self) -> list[str]:
        """Human lines."""
        files = f"{len(self.files):,} file{'s' if len(self.files) != 1 else ''}"
        if away := [file.found for file in self.files if isinstance(file, RemoteFile)]:
            commit = f", at commit {away[0].commit}" if away[0].commit else ""
            files += f" elsewhere ({sum(found.size for found in away) / GIB:,.2f} GiB{commit})"
        elif is_remote(self.path):
            size = sum(file.stat().st_size for file in self.files) / GIB
            files += f" fetched whole ({size:,.2f} GiB beside stream.cache_gib)"
        share = "its share by stream.mix" if self.share is None else f"{self.share:.1%}"
        how = f"{files}, read while training, format {self.format} ({self.evidence}), {share}"
        lost = f"  warning: the reasoning of {self.unwritten:,} messages in its first {CHUNK} rows {UNWRITTEN}"
        return [f"{self.name}: {how}", *([lost] if self.unwritten else [])]


def _beginning(
    shape: Shape, data: Data, tokenizer: Tokenizer, files: list[File], places: Iterator[sources.Place]
) -> int:
    """Messages in the first rows of a source whose reasoning the template leaves out. UserError for a broken row."""
    job = Job(shape, tokenizer, replace(data, overlong="split"), files, keep_examples=False)
    first = [(files.index(place.file), place.row.line, place.row.value) for place in islice(places, CHUNK)]
    free = shape.format in TEMPLATE_FREE  # which may be whole books
    done = [_looked_at(job, *row) for row in first] if free else job.rows(first)
    bad = next((row.error for row in done if row.error is not None), None)
    if bad is not None and data.on_bad_row == "error":
        raise bad
    return sum(row.unwritten for row in done)


def _looked_at(job: Job, file: int, line: int, value: Any) -> Outcome:
    """A row that is read and not tokenised."""
    done = Outcome(file, line, error=value if isinstance(value, UserError) else None)
    try:
        if done.error is None:
            job.read(done, value)
    except UserError as error:
        done.error = error
    return done


def _files(source: Source, stream: Stream, key: str) -> list[File]:
    """The files of a source; pieces of remote ones go to one folder, whatever they belong to."""
    folder = cache_folder() / "pieces"
    try:
        if is_remote(source.path):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "name a folder that can be written to"
        raise UserError(f"{folder} cannot be made: {error.strerror}", where="FTLIB_CACHE", fix=fix) from None
    try:
        return sources.streamed_files(source, Pieces(folder, int(stream.cache_gib * GIB)), key)
    except (UserError, OSError) as error:
        raise sources.told(error, key) from None


def _ahead(stream: Stream, listed: Sequence[Sequence[File]]) -> int:
    """Pieces of each source that are fetched before they are needed. UserError where the disk lacks the room."""
    away = [files for files in listed if any(isinstance(file, RemoteFile) for file in files)]
    if not away:
        return 0
    folder, free = away[0][0].pieces.folder, away[0][0].pieces.room()
    need = min(stream.cache_gib * GIB, sum(file.found.size for files in away for file in files))
    if need > free:
        what = f"pieces of remote files may take {need / GIB:.2f} GiB, {folder} has room for {free / GIB:.2f}"
        fix = f"set stream.cache_gib={free / GIB * 0.8:.2f} or less, or FTLIB_CACHE to a folder with more room"
        raise UserError(what, where="stream.cache_gib", fix=fix)
    return max(1, min(pieces.AHEAD, int(stream.cache_gib * GIB) // (2 * pieces.PIECE * len(away)) - 1))


def _name(source: Source, files: list[File]) -> str:
    if source.name:
        return source.name
    return stem(files[0]) if len(files) == 1 else source.path.rstrip("/*").rsplit("/", 1)[-1]


def _held_out(
    data: Data, held: list[Source], listed: list[list[File]], tokenizer: Tokenizer, seed: int, count: int
) -> dict[str, Documents]:
    """Held-out sets by name. `count`: of the first rows that each source of training gives; 0: sources of their own."""
    key = "data.sources" if count else "data.eval"
    settings = replace(data, sources=tuple(held), eval=None, overlong="split")
    if count or any(isinstance(file, RemoteFile) for files in listed for file in files):
        settings = replace(settings, cache="none")  # whose key is made of all bytes of the files
    loaded = load(settings, tokenizer, seed=seed, key=key, files=listed)
    for source in loaded.report.sources:
        if source.rows < count:
            what = f"holding out {count:,} rows leaves none of source {source.name!r}, which has {source.rows:,}"
            raise UserError(what, where="data.eval", fix="hold out fewer, or name files of held-out rows there")
    everything = loaded.train
    names = [source.name for source in everything.sources]
    return {name: everything.select(everything.source_ids == i) for i, name in enumerate(names)}


def _check_unchanged(source: StreamSource, then: list[str]) -> None:
    """UserError if the remote files of a source are not those of a checkpoint."""
    if then == source.versions:
        return
    files = [file for file in source.files if isinstance(file, RemoteFile)]
    if len(then) != len(files):
        what = f"source {source.name!r} has {len(files):,} files elsewhere, it had {len(then):,}"
        raise pieces.changed(what, "data.sources")
    first = next(file for file, version in zip(files, then, strict=True) if file.version != version)
    now = f"{first.found.size:,} bytes, version {first.found.version!r}"
    raise pieces.changed(f"{first} is another one now ({now})", first.key)


class StreamLoader:
    """Endless iterator of `StreamStep`. Rows are those of the plan's lanes; data rank r takes its slice of them.

    `gather` is called on every process alike: at the first step, for the numbers of each when there are several, and
    for `state_dict`, which is the same on all of them. Workers start with the first step.
    """

    def __init__(
        self,
        plan: StreamPlan,
        *,
        micro_rows: int,
        pad_id: int,
        workers: int,
        rank: int = 0,
        ranks: int = 1,
        pin: bool = False,
        share: Callable[[Batch], Batch] | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.plan, self.max_documents = plan, plan.max_documents
        own = plan.lanes // ranks
        self._own = range(rank * own, (rank + 1) * own)
        self._micro_rows, self._pad_id, self._pin, self._share = micro_rows, pad_id, pin, share
        self._workers, self._rank, self._gather = workers, rank, gather
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._source: Callable[[], list[Packed]] | None = None
        self._processes: Workers | None = None
        self._states: list[dict[str, Any] | None] = [None] * own
        self._made: deque[Future[tuple[list[Batch], list[Packed]]]] = deque()

    def __iter__(self) -> Iterator[StreamStep]:
        return self

    def __next__(self) -> StreamStep:
        if self._source is None:
            self._start()
        while len(self._made) <= AHEAD:
            self._made.append(self._pool.submit(self._make))
        batches, rows = self._made.popleft().result()
        self._states = [row.state for row in rows]
        taken = zip(*(row.taken for row in rows), strict=True)
        own = sum(row.targets for row in rows), sum(row.weight for row in rows)
        targets, weight, *taken = self._summed([*own, *map(sum, taken)])
        names = [source.name for source in self.plan.sources]
        return StreamStep(batches, targets, weight, sum(taken), dict(zip(names, taken, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """Position of the next step: the state of every lane, and the versions of remote files. Collective."""
        mine = {"rank": self._rank, "lanes": self._states}
        parts = [mine] if self._gather is None else self._gather(mine)
        by_rank = {part["rank"]: part for part in parts}  # processes that share rows tell the same
        lanes = [state for rank in sorted(by_rank) for state in by_rank[rank]["lanes"]]
        return {"lanes": lanes, "files": [source.versions for source in self.plan.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` taken at any number of ranks. UserError if it belongs to another stream."""
        lanes, files = state.get("lanes", ()), state.get("files", ())
        if len(lanes) != self.plan.lanes or len(files) != len(self.plan.sources):
            raise UserError(
                "the checkpoint's position is not one of this stream",
                where="stream, data.sources, batch.rows",
                fix="set them back as they were, or start over: checkpoint.resume=never",
            )
        for source, then in zip(self.plan.sources, files, strict=True):
            _check_unchanged(source, then)
        self.close()
        self._states = [lanes[i] for i in self._own]

    def close(self) -> None:
        """End the workers; the position stays."""
        made, self._made = self._made, deque()
        for future in made:
            future.cancel()
        if self._processes is not None:
            self._processes.close()
        self._pool.shutdown()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._source = self._processes = None

    def _start(self) -> None:
        files = [source.versions for source in self.plan.sources]
        told = [] if self._gather is None else self._gather([self._rank, files])
        if any(theirs != files for _, theirs in told):  # a branch of the Hub that moved while they started
            fix = "start again; of the Hub, org/name@commit names the same files for all"
            raise UserError("processes found different files elsewhere", where="data.sources", fix=fix)
        if self._workers:
            self._processes = Workers(self.plan, self._own, self._states, self._workers)
            self._source = self._processes.rows
        else:
            lanes = make_lanes(self.plan, self._own, self._states)
            self._source = lambda: next_rows(lanes)

    def _make(self) -> tuple[list[Batch], list[Packed]]:
        rows = self._source()
        starts = range(0, len(rows), self._micro_rows)
        return [self._batch(rows[at : at + self._micro_rows]) for at in starts], rows

    def _batch(self, rows: list[Packed]) -> Batch:
        seq_len = self.plan.cfg.seq_len
        batch = from_documents([row.pieces for row in rows], seq_len, self._pad_id, self.max_documents)
        batch = batch if self._share is None else self._share(batch)
        return batch.pin_memory() if self._pin else batch

    def _summed(self, mine: list[float]) -> list[float]:
        if self._gather is None:
            return mine
        by_rank = dict(self._gather([self._rank, mine]))
        return [sum(column) for column in zip(*by_rank.values(), strict=True)]
