"""Files -> rows with their line numbers. Every problem is one UserError that names the file, and the line if any.

Kinds: JSON (a list of objects), JSON lines, plain text; each also gzipped. The kind of a file is told by its content,
but for text, which is told by its name.
"""

import difflib
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ftlib.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".text")
_SPACE = re.compile(r"[ \t\r\n]*")
_HUB_ID = re.compile(r"[\w-]+/[\w-]+")
_SPLIT = re.compile(r"(?:train|all)?(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SIGNS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "run `git lfs pull` in its repository"),
    (b"<!doctype html", "an HTML page, not data", "download the raw file, not the page that shows it"),
    (b"<html", "an HTML page, not data", "download the raw file, not the page that shows it"),
    (b"\xff\xfe", "UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8-{path}"),
    (b"\xfe\xff", "UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8-{path}"),
    (b"par1", "a Parquet file, which is not read yet", "convert it to JSON lines"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive, which is not read yet", "decompress it first: zstd -d {path}"),
    (b"pk\x03\x04", "a zip archive", "unpack it first: unzip {path}"),
)


class Row(NamedTuple):
    """One row of a file and the line it starts at (from 1)."""

    line: int
    value: dict


def locate(path: str) -> Path:
    """The file behind a source's path: local, or `ftlib:…` for what ships with the package. UserError if none is."""
    if path.startswith("ftlib:"):
        from ftlib.models.hub import resolve

        return resolve(path)
    file = Path(path).expanduser()
    if file.is_file():
        relative = os.path.relpath(file)
        return Path(relative) if len(relative) < len(str(file)) else file  # as a user would write it in a message
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.is_file() and not p.name.startswith("."))
        listed = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
        raise UserError(f"{file} is a folder, not a file", fix=f"name a file in it: {listed or 'it has none'}")
    parent = next(p for p in file.absolute().parents if p.is_dir())
    fix = f"the nearest folder that exists is {parent}"
    if parent == file.absolute().parent:
        near = difflib.get_close_matches(file.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.6)
        fix = f"similar names there: {', '.join(near)}" if near else f"{parent} has no file of a similar name"
    if _HUB_ID.fullmatch(path):
        fix += "; a data set of the Hub must be downloaded first, and its file named here"
    raise UserError(f"no such file: {file} (working directory: {Path.cwd()})", fix=fix)


def read(file: Path, split: str | None = None) -> Iterator[Row]:
    """Rows of `file`, lazily, or the slice of them that `split` names (`train`, `[:90%]`, `[1000:]`)."""
    start, stop = _bounds(file, split)
    rows = islice(_rows(file), start, stop)
    first = next(rows, None)
    if first is None:
        if start or stop is not None:
            raise UserError(
                f"the split {split} leaves no rows of {file}", fix="check the slice against the file's rows"
            )
        raise UserError(f"{file} is empty (0 rows)", fix="point the source at a file with rows")
    yield first
    yield from rows


def _bounds(file: Path, split: str | None) -> tuple[int, int | None]:
    match = _SPLIT.fullmatch(split or "train")
    if not match:
        raise UserError(
            f"split {split!r} of {file} is not understood", fix="write `train`, `[:90%]`, `[1000:]` or `[10:20]`"
        )
    start, stop = match.groups()
    if not any(bound and ("%" in bound or bound.startswith("-")) for bound in (start, stop)):
        return int(start or 0), int(stop) if stop else None
    count = sum(1 for _ in _rows(file))

    def place(bound: str) -> int:
        number = count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
        return min(max(number + count if bound.startswith("-") else number, 0), count)

    return place(start) if start else 0, place(stop) if stop else count


def _rows(file: Path) -> Iterator[Row]:
    try:
        with _open(file) as stream:
            head = stream.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
            _check_signs(file, head)
            if file.name.removesuffix(".gz").endswith(TEXT_SUFFIXES):
                yield from _text_rows(file, stream)
            elif head[:1] == b"[":
                yield from _json_rows(file, stream.read())
            elif head[:1] == b"{" or not head:
                yield from _line_rows(file, stream)
            else:
                raise UserError(
                    f"{file} holds neither JSON objects nor a list of them; it begins with {head[:20]!r}",
                    fix=f"rows are JSON lines, a JSON list, or plain text in a file called {', '.join(TEXT_SUFFIXES)}",
                )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read: {error}", fix="check its permissions; fetch it again if it is cut off"
        ) from None


def _open(file: Path) -> BinaryIO:
    with open(file, "rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return gzip.open(file, "rb") if zipped else open(file, "rb")


def _check_signs(file: Path, head: bytes) -> None:
    for sign, what, fix in _SIGNS:
        if head[: len(sign)].lower() == sign:
            raise UserError(f"{file} is {what}", fix=fix.format(path=file.name))
    if b"\0" in head:
        raise UserError(
            f"{file} holds binary data, or text that is not UTF-8", fix="rows are JSON, JSON lines or UTF-8 text"
        )


def _decode(file: Path, raw: bytes, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise UserError(
            f"not UTF-8: byte 0x{raw[error.start]:02x}",
            where=f"{file}:{line}:{column}",
            fix=f"convert the file, for example: iconv -f LATIN1 -t UTF-8 {file.name} > utf8-{file.name}",
        ) from None


def _line_rows(file: Path, stream: BinaryIO) -> Iterator[Row]:
    for line, raw in enumerate(stream, 1):
        text = _decode(file, raw, line).rstrip()  # columns count from the start of the line
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if line == 1 and text.strip() == "{":
                raise UserError(
                    f"{file} is not rows: it begins with an object that runs over several lines",
                    where=f"{file}:1",
                    fix="write one object a line, or put the objects into a list [ … ]",
                ) from None
            raise _bad_json(file, line, text, error) from None
        yield Row(line, _object(file, line, value))


def _json_rows(file: Path, raw: bytes) -> Iterator[Row]:
    text, decoder = _decode(file, raw, 1), json.JSONDecoder()

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()

    def fail(message: str) -> UserError:
        return _bad_json(file, line, text, json.JSONDecodeError(message, text, at))

    at = skip(skip(0) + 1)
    line, counted, more = 1, 0, text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _bad_json(file, line, text, error) from None
        yield Row(line, _object(file, line, value))
        at = skip(end)
        more = text[at : at + 1] == ","
        if more:
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise fail("expected ',' or ']' after a row" if at < len(text) else "the list is not closed by ']'")
    at = skip(at + 1)
    if at < len(text):
        raise fail("something follows the list")


def _bad_json(file: Path, line: int, text: str, error: Exception) -> UserError:
    """`line`: where the row begins, for errors that know no position of their own."""
    if not isinstance(error, json.JSONDecodeError):  # nested too deeply, or a number of thousands of digits
        return UserError(f"invalid JSON: {error}", where=f"{file}:{line}", fix="mend or remove this row")
    near = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
    line = error.lineno if "\n" in text else line
    return UserError(
        f"invalid JSON: {error.msg}, near `{near}`",
        where=f"{file}:{line}:{error.colno}",
        fix="mend or remove this row",
    )


def _object(file: Path, line: int, value: object) -> dict:
    if isinstance(value, dict):
        return value
    kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
    raise UserError(f"a row must be an object with named columns, this one is {kind}", where=f"{file}:{line}")


def _text_rows(file: Path, stream: BinaryIO) -> Iterator[Row]:
    """Paragraphs, that is what blank lines set apart; in a file without any, lines."""
    lines = [(n, _decode(file, raw, n).rstrip("\r\n")) for n, raw in enumerate(stream, 1)]
    while lines and not lines[-1][1].strip():
        lines.pop()
    paragraphs = any(not line.strip() for _, line in lines)
    for key, group in groupby(lines, key=lambda line: bool(line[1].strip()) and (paragraphs or line[0])):
        if key:
            part = list(group)
            yield Row(part[0][0], {"text": "\n".join(line for _, line in part)})
