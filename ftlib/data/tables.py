"""Parquet and Arrow files through pyarrow, a batch of rows at a time. A row's line is its number, from 1."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.data.pieces import RemoteFile
from ftlib.data.rows import Row
from ftlib.errors import UserError

ROWS = 1024  # read at a time


def read(file: Path | RemoteFile, parquet: bool) -> Iterator[Row]:
    """Rows of a Parquet file, or of an Arrow file or stream."""
    import pyarrow

    number = 0
    try:
        for batch in _parquet(file) if parquet else _arrow(file):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)
    except (pyarrow.ArrowException, OSError) as error:
        kind = "a Parquet" if parquet else "an Arrow"
        what = f"{file} is {kind} file that cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, where=str(file), fix="fetch it again: it may be cut off") from None


def _parquet(file: Path | RemoteFile) -> Iterator[Any]:
    from pyarrow import parquet

    near = isinstance(file, Path)  # pyarrow reads it by itself
    with contextlib.nullcontext(file) if near else file.open("rb") as source, parquet.ParquetFile(source) as opened:
        yield from opened.iter_batches(ROWS)


def _arrow(file: Path | RemoteFile) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file.open("rb")) as source:
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:  # a stream, as the datasets library writes its cache
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield batch.slice(start, ROWS)
