"""What is in a data set, row by row: for `tune doctor`, and for anyone who wants to know before training."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ftlib.data import doctor_answers, sources
from ftlib.data.collect import Job, Outcome, find_shape, opened
from ftlib.data.doctor_findings import Findings, Row
from ftlib.data.documents import Documents
from ftlib.data.examples import Shape
from ftlib.data.formats import kind
from ftlib.data.masks import Tokenizer
from ftlib.data.preview import merged, preview
from ftlib.data.report import UNTRAINED
from ftlib.data.store import MemoryWriter
from ftlib.errors import UserError
from ftlib.sections import Data, Source

KEY = "data.sources[0]"  # what a config would call the data
SHOWN = 5  # rows on the page, rendered with their trained tokens marked


def examine(
    path: str, tokenizer: Tokenizer, *, seq_len: int, format: str = "auto", held_out: str | None = None
) -> Findings:
    """Read every row of `path` as training would. UserError where no row can be read at all."""
    shape, places = _opened(path, format)
    if kind(shape.format) != "train":
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
