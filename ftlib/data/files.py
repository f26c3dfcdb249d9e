"""One file -> its rows with their line numbers. The kind is told by the content, but for text and CSV: by the name.

A line that cannot be read is a row whose value is its UserError, so that the caller may go on; what is wrong with the
whole file is raised.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

from ftlib.data import json_list
from ftlib.data.pieces import RemoteFile
from ftlib.data.rows import Row, Start, as_object, bad_json, not_utf8
from ftlib.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".text")
CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", *CSV_SUFFIXES, *TEXT_SUFFIXES)
PACKED = (".gz", ".zst")
SCANNED = 64 << 20  # bytes of a text that are searched for paragraphs
_SIGNS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "run `git lfs pull` in its repository"),
    (b"<!doctype html", "an HTML page, not data", "name the raw file, not a page that shows it or lists several"),
    (b"<html", "an HTML page, not data", "name the raw file, not a page that shows it or lists several"),
    (b"\xff\xfe", "UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8-{path}"),
    (b"\xfe\xff", "UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8-{path}"),
    (b"pk\x03\x04", "a zip archive", "unpack it first: unzip {path}"),
)


File = Path | RemoteFile


def stem(file: File) -> str:
    """The name of a file without what says how it is packed and written."""
    name = file.name
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name.rsplit(".", 1)[0]


def read_file(file: File, start: Start = Start()) -> Iterator[Row]:
    """Rows of one file, lazily; those behind `start`, before which no more is read and parsed than has to be."""
    name = file.name
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    try:
        with _open(file) as stream:
            head = stream.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
            _check_signs(file, head)
            if head[:4] == b"PAR1" or head[:6] == b"ARROW1" or name.endswith(".arrow"):
                from ftlib.data import tables  # pyarrow, only where it is needed

                yield from tables.read(file, head[:4] == b"PAR1", start.rows)
            elif name.endswith(".parquet") and head[:1] not in (b"{", b"["):
                what = f"{file} is no Parquet file: it does not begin with PAR1"
                raise UserError(what, fix="fetch it again, or give it the name of what it is")
            elif b"\0" in head:
                what = f"{file} holds binary data, or text that is not UTF-8"
                raise UserError(what, fix="rows are JSON, JSON lines or UTF-8 text")
            elif name.endswith(TEXT_SUFFIXES):
                yield from islice(_text_rows(file, stream), start.rows, None)
            elif name.endswith(CSV_SUFFIXES):
                yield from islice(_csv_rows(file, stream, "\t" if name.endswith(".tsv") else ","), start.rows, None)
            elif head[:1] == b"[":
                yield from islice(json_list.read(file, stream), start.rows, None)
            elif head[:1] == b"{" or not head:
                yield from _line_rows(file, stream, start)
            else:
                raise UserError(
                    f"{file} holds neither JSON objects nor a list of them; it begins with {_quoted(head)}",
                    fix=f"rows are JSON lines, a JSON list, or plain text in a file called {', '.join(TEXT_SUFFIXES)}",
                )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read: {error}",
            where=str(file),
            fix="check its permissions; fetch it again if it is cut off",
        ) from None


def _quoted(head: bytes) -> str:
    return f"`{head[:20].decode('utf-8', 'replace')}`"


@contextmanager
def _open(file: File) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    with file.open("rb") as stream:
        sign = stream.peek(4)[:4]
        if sign[:2] == b"\x1f\x8b":
            yield gzip.GzipFile(fileobj=stream)
        elif sign == b"\x28\xb5\x2f\xfd":
            import pyarrow  # its codec; Python has one of its own from 3.14 on

            yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
        else:
            yield stream


def _check_signs(file: File, head: bytes) -> None:
    for sign, what, fix in _SIGNS:
        if head[: len(sign)].lower() == sign:
            raise UserError(f"{file} is {what}", fix=fix.format(path=file.name))


def _decode(file: File, raw: bytes, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, line - 1, 0) from None


def _line_rows(file: File, stream: BinaryIO, start: Start) -> Iterator[Row]:
    end = start.end
    _forward(stream, end)
    for line, raw in enumerate(stream, start.line + 1):
        if line == 1 and raw.removeprefix(b"\xef\xbb\xbf").strip() == b"{":  # one object over several lines
            raw += stream.read()
        end += len(raw)
        try:
            text = _decode(file, raw, line).rstrip()  # columns count from the start of the line
            if text.strip():
                yield Row(line, _line_row(file, line, text), end)
        except UserError as error:
            yield Row(line, error, end)


def _forward(stream: BinaryIO, end: int) -> None:
    """Go on from byte `end`; what is packed is unpacked up to there."""
    if stream.seekable():
        stream.seek(end)
    while not stream.seekable() and end and (part := stream.read(min(1 << 20, end))):
        end -= len(part)


def _line_row(file: File, line: int, text: str) -> dict:
    try:
        return as_object(file, line, json.loads(text))
    except (ValueError, RecursionError) as error:
        if line == 1 and "\n" in text and "Extra data" in str(error):
            raise UserError(
                f"{file} is not rows: its objects run over several lines",
                where=f"{file}:1",
                fix="write one object a line, or put the objects into a list [ … ]",
            ) from None
        raise bad_json(file, line, text, error) from None


def _csv_rows(file: File, stream: BinaryIO, delimiter: str) -> Iterator[Row]:
    import csv

    csv.field_size_limit(1 << 30)
    first = stream.peek(1 << 16).split(b"\n")[0]
    if delimiter.encode() not in first:  # spreadsheets write others, whatever the file is called
        delimiter = next((other for other in ",;\t" if other.encode() in first), delimiter)
    reader = csv.reader((_decode(file, raw, n) for n, raw in enumerate(stream, 1)), delimiter=delimiter, strict=True)
    names, line, marks = None, 1, {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = "mend the quotes of this row"
            yield Row(line, UserError(f"broken CSV: {error}", where=f"{file}:{line}", fix=fix))
            return  # where the next row begins is not known
        if cells is None:
            return
        if names is None:
            names = [name.strip() for name in cells]
            double = next((name for name in names if names.count(name) > 1 or not name), None)
            if double is not None:
                what = f"two columns are called {double!r}" if double else "a column has no name"
                raise UserError(what, where=f"{file}:1", fix="the first line of a CSV file names its columns")
        elif len(cells) == len(names):
            yield Row(line, dict(zip(names, cells, strict=True)))
        elif cells:
            what = f"{len(cells)} cells, but the file has {len(names)} columns"
            yield Row(line, UserError(what, where=f"{file}:{line}", fix=f"put texts that hold {marks} in quotes"))
        line = reader.line_num + 1


def _text_rows(file: File, stream: BinaryIO) -> Iterator[Row]:
    """Paragraphs, that is what blank lines set apart; in a file without any, lines. One is in memory at a time."""
    with _open(file) as scan:
        paragraphs = _has_paragraphs(scan)
    lines = ((n, _decode(file, raw, n).rstrip("\r\n")) for n, raw in enumerate(stream, 1))
    for key, group in groupby(lines, key=lambda line: bool(line[1].strip()) and (paragraphs or line[0])):
        if key:
            part = list(group)
            yield Row(part[0][0], {"text": "\n".join(line for _, line in part)})


def _has_paragraphs(lines: BinaryIO) -> bool:
    """Whether a blank line has text before and behind it; in a large file, among the first bytes."""
    texts = (text for text, _ in groupby(_first(lines, SCANNED), key=lambda line: bool(line.strip())) if text)
    return next(texts, False) and next(texts, False)


def _first(lines: BinaryIO, size: int) -> Iterator[bytes]:
    for line in lines:
        yield line
        size -= len(line)
        if size < 0:
            return
