"""Limits on a chat template while it runs: time, text written, and the size of any value it makes.

Jinja's sandbox keeps a template from the interpreter, but not from running for ever or filling the memory. Loops, calls
and filters check the clock; operations that could make a huge value in one go are refused beforehand, because nothing
can interrupt them. All checks are ordinary calls: they work in any thread and under any load.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 2.0
# On a crowded machine two seconds may pass before a good template had its turn: it must have used some itself.
CPU_SECONDS = 1.0
OUTPUT = 1 << 20  # characters of the rendered conversation
VALUE = 1 << 22  # characters and items in any one value, and written in all, what is captured included
MADE = 1 << 26  # the same in all values made by calls, filters and operators
_BITS, _TABS = 256, 200  # of a number; of a tab
# The largest numbers that filters take.
_WIDTHS = {"center": VALUE, "indent": 200, "tojson": 200, "batch": 100_000, "slice": 100_000}
_WIDTH = re.compile(r"%[-+ #0]*[\d.]*\d{6}|\{[^{}]*:[^{}]*\d{6}")  # in '%…d' or '{:…}'
_WIDTH_GIVEN = re.compile(r"%[-+ #0]*[\d.]*\*|\{[^{}]*:[^{}]*\{")


class TooMuch(Exception):
    """A limit was passed; the message says which."""


class Meter:
    """The clock and the counters of one rendering."""

    def __init__(self) -> None:
        self._deadline, self._cpu = time.monotonic() + SECONDS, time.thread_time()
        self._written = self._made = 0

    def tick(self) -> bool:
        """Called at every turn of a loop, call and filter; always true. Raises TooMuch past the deadline."""
        if time.monotonic() > self._deadline and time.thread_time() - self._cpu > CPU_SECONDS:
            raise TooMuch(f"it ran for more than {SECONDS:g} seconds")
        return True

    def write(self, value: Any) -> Any:
        """Count what is written, also what goes into a variable or a macro's result. Returns the value."""
        self._written += len(value if isinstance(value, str) else str(value))
        if self._written > VALUE:
            raise TooMuch(f"it wrote more than {VALUE:,} characters")
        return value

    def watch(self, name: str, values: Sequence[Any]) -> None:
        """Called before a filter, or a function (then without a name), gets these values. Here they pass."""

    def weigh(self, value: Any) -> Any:
        """Return a value that is small enough, its parts counted each time they occur; else raise TooMuch."""
        if isinstance(value, str | bytes):
            weight = len(value)
        elif isinstance(value, list | tuple | set | Mapping):
            weight = _parts(value)
        else:
            return value
        self._made += weight
        if weight > VALUE or self._made > MADE:
            raise TooMuch("it makes a text or a list that is too large")
        return value


def _parts(value: Any) -> int:
    """Characters and items in a value, nested ones too; stops counting past VALUE."""
    weight, left = 0, [value]
    while left and weight + len(left) <= VALUE:
        item = left.pop()
        weight += 1 + (len(item) if isinstance(item, str | bytes) else 0)
        if isinstance(item, Mapping):
            left.extend(item.keys())
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)
    return weight + len(left)


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse `'x' * 10 ** 9`, `9 ** 9 ** 9`, `'%999999999d' % 1` before they run."""
    if operator == "%" and isinstance(left, str | bytes):
        _check_format(left, right if isinstance(right, tuple) else (right,))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _BITS:
            raise TooMuch("it computes too large a power")
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _BITS:
            raise TooMuch("it computes too large a number")
    elif operator == "*":
        for value, count in ((left, right), (right, left)):
            if hasattr(value, "__len__") and isinstance(count, int) and len(value) * count > VALUE:
                raise TooMuch(f"it repeats a value to more than {VALUE:,} characters or parts")


def check_call(function: Any, values: Sequence[Any]) -> None:
    """Refuse methods of texts and numbers whose result would be huge, such as `'x'.ljust(10 ** 9)`."""
    function = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str | bytes | int):
        return
    if name in ("format", "format_map"):
        _check_format(owner, values)
    elif any(isinstance(value, int) and abs(value) > (_TABS if name == "expandtabs" else VALUE) for value in values):
        raise TooMuch(f"it calls {name} with too large a number")
    elif name == "translate":
        raise TooMuch("it calls translate, whose result has no bound")
    elif name == "replace":
        check_filter(name, owner, values)
    elif name == "join" and values:
        check_filter(name, values[0], (owner,))


def check_filter(name: str, value: Any, values: Sequence[Any]) -> None:
    """Refuse filters whose result would be huge; `values` are their arguments."""
    numbers = [abs(v) for v in values if isinstance(v, int)]
    if name in _WIDTHS and any(number > _WIDTHS[name] for number in numbers):
        raise TooMuch(f"it gives {name} too large a number")
    if name == "format":
        _check_format(value, values)
    elif name == "sum" and any(isinstance(v, list | tuple) for v in values):
        raise TooMuch("it adds up lists")
    elif name == "join" and values and hasattr(values[0], "__len__") and hasattr(value, "__len__"):
        if len(value) * len(values[0]) > VALUE:
            raise TooMuch("it joins too many parts")
    elif name == "replace" and len(values) > 1:
        old, new = str(values[0]), str(values[1])
        if str(value).count(old) * len(new) > VALUE:
            raise TooMuch("it replaces too much")


def _check_format(form: Any, values: Sequence[Any]) -> None:
    """Widths of a format: written out, or taken from the values."""
    form = form.decode(errors="replace") if isinstance(form, bytes) else str(form)
    form = form.replace("{{", "").replace("}}", "")  # braces that are text
    given = [v for value in values for v in (value.values() if isinstance(value, Mapping) else (value,))]
    if _WIDTH.search(form) or (_WIDTH_GIVEN.search(form) and any(isinstance(v, int) and abs(v) > VALUE for v in given)):
        raise TooMuch("it formats with too large a width")
