"""A row of a file, of whatever kind, and what may be wrong with one."""

import json
from pathlib import Path
from typing import NamedTuple

from ftlib.errors import UserError


class Row(NamedTuple):
    """One row of a file and the line it starts at (from 1), or what is wrong with that line. `end`: of files of JSON
    lines, bytes up to the next one."""

    line: int
    value: dict | UserError
    end: int = 0


class Start(NamedTuple):
    """Where reading a file goes on: behind so many rows, the last of them at `line` and `end` (as of a `Row`)."""

    rows: int = 0
    line: int = 0
    end: int = 0


def not_utf8(file: Path, error: UnicodeDecodeError, lines: int, column: int) -> UserError:
    """A byte that is no text. `lines`, `column`: line breaks before what was decoded, and bytes since the last one."""
    raw = error.object
    before, breaks = raw.rfind(b"\n", 0, error.start), raw.count(b"\n", 0, error.start)
    column = error.start - before if before >= 0 else column + error.start + 1
    return UserError(
        f"not UTF-8: byte 0x{raw[error.start]:02x}",
        where=f"{file}:{lines + 1 + breaks}:{column}",
        fix=f"convert the file, for example: iconv -f LATIN1 -t UTF-8 {file.name} > utf8-{file.name}",
    )


def bad_json(file: Path, line: int, text: str, error: Exception) -> UserError:
    """What is wrong with a row's JSON. `line`: where the row begins, for errors that know no position of their own."""
    if not isinstance(error, json.JSONDecodeError):  # nested too deeply, or a number of thousands of digits
        return UserError(f"invalid JSON: {error}", where=f"{file}:{line}", fix="mend or remove this row")
    near = text[max(0, error.pos - 20) : error.pos + 20].replace("\n", " ")
    line = error.lineno if "\n" in text else line
    return UserError(
        f"invalid JSON: {error.msg}, near `{near}`",
        where=f"{file}:{line}:{error.colno}",
        fix="mend or remove this row",
    )


def as_object(file: Path, line: int, value: object) -> dict:
    """A value that is a row. UserError if it is none."""
    if isinstance(value, dict):
        return value
    kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
    raise UserError(f"a row must be an object with named columns, this one is {kind}", where=f"{file}:{line}")
