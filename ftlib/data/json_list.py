"""A JSON list of rows, read a window at a time: a file larger than the memory is no burden."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ftlib.data.rows import Row, as_object, bad_json, not_utf8
from ftlib.errors import UserError

CHUNK = 1 << 20  # bytes read at a time, or as much as is held: long rows are not read again and again
_SPACE = re.compile(r"[ \t\r\n]*")
_LAST = 12  # characters at the end of a window that may be half of an escape, a number or a word


def read(file: Path, stream: BinaryIO) -> Iterator[Row]:
    """Rows of a file that holds one list of objects. Raises a UserError for what is wrong with the file."""
    window = _Window(file, stream)
    window.next()
    window.at += 1
    more = window.next() != "]"
    while more:
        line = window.line
        yield Row(line, as_object(file, line, window.value()))
        sign = window.next()
        if sign == ",":
            window.at += 1
            window.next()
        elif sign != "]":
            raise window.wrong("expected ',' or ']' after a row" if sign else "the list is not closed by ']'")
        more = sign == ","
    window.at += 1
    if window.next():
        raise window.wrong("something follows the list")


class _Window:
    """The part of a stream's text that is held: what lies before `at` is forgotten when more is read."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self._stream = file, stream
        self.text, self.at, self._ended = "", 0, False
        self._decoder, self._scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
        self._first, self._column = 1, 0  # line of the text's first character, and characters before it on that line
        self._counted, self._lines = 0, 0  # line breaks in text[:_counted]
        self._breaks = self._line_bytes = 0  # line breaks, and bytes behind the last, in the chunks before

    @property
    def line(self) -> int:
        """The line of `at`."""
        self._lines += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._first + self._lines

    def next(self) -> str:
        """Skip white space; the character there, or none at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value at `at`, which moves behind it."""
        while True:
            try:
                found, end = self._scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _LAST
                if cut_off and self._more():
                    continue
                raise self.wrong(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise bad_json(self.file, self.line, "", error) from None
            if end < len(self.text) or not self._more():  # a number may go on
                self.at = end
                return found

    def wrong(self, message: str, at: int | None = None) -> UserError:
        """An error that names line and column of `at`."""
        at = self.at if at is None else at
        before = self.text.rfind("\n", 0, at)
        column = at - before if before >= 0 else self._column + at + 1
        where = f"{self.file}:{self._first + self.text.count(chr(10), 0, at)}:{column}"
        near = self.text[max(0, at - 20) : at + 20].replace("\n", " ")
        return UserError(f"invalid JSON: {message}, near `{near}`", where=where, fix="mend or remove this row")

    def _more(self) -> bool:
        """Forget what lies before `at` and read on; false at the end."""
        if self._ended:
            return False
        line, before = self.line, self.text.rfind("\n", 0, self.at)
        self._column = self.at - before - 1 if before >= 0 else self._column + self.at
        self._first, self._counted, self._lines = line, 0, 0
        raw = self._stream.read(max(CHUNK, len(self.text) - self.at))
        self._ended = not raw
        held = len(self._decoder.getstate()[0])
        try:
            self.text = self.text[self.at :] + self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise not_utf8(self.file, error, self._breaks, self._line_bytes - held) from None
        self.at = 0
        self._breaks += raw.count(b"\n")
        last = raw.rfind(b"\n")
        self._line_bytes = len(raw) - last - 1 if last >= 0 else self._line_bytes + len(raw)
        return True
