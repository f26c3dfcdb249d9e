"""Parquet and Arrow files through pyarrow, a batch of rows at a time. A row's line is its number, from 1."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.data.pieces import RemoteFile
from ftlib.data.rows import Row
from ftlib.errors import UserError

ROWS = 1024  # read at a time


def read(file: Path | RemoteFile, parquet: bool, skip: int = 0) -> Iterator[Row]:
    """Rows of a Parquet file, or of an Arrow file or stream, behind the first `skip`."""
    import pyarrow

    try:
        for number, batch in _parquet(file, skip) if parquet else _arrow(file):
            known = max(0, skip - number)
            for row, value in enumerate(batch.slice(known).to_pylist(), number + known + 1):
                yield Row(row, value)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "a Parquet" if parquet else "an Arrow"
        what = f"{file} is {kind} file that cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, where=str(file), fix="fetch it again: it may be cut off") from None


def _parquet(file: Path | RemoteFile, skip: int) -> Iterator[tuple[int, Any]]:
    """Batches, and the rows before each; what lies in groups of skipped rows is not read."""
    from pyarrow import parquet

    near = isinstance(file, Path)  # pyarrow reads it by itself
    with contextlib.nullcontext(file) if near else file.open("rb") as source, parquet.ParquetFile(source) as opened:
        first, number = 0, 0
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        while first < len(sizes) and number + sizes[first] <= skip:
            number += sizes[first]
            first += 1
        for batch in opened.iter_batches(ROWS, row_groups=list(range(first, len(sizes)))):
            yield number, batch
            number += batch.num_rows


def _arrow(file: Path | RemoteFile) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file.open("rb")) as source:
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:  # a stream, as the datasets library writes its cache
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield number + start, batch.slice(start, ROWS)
            number += batch.num_rows
