"""The one progress display: a live line on a terminal, plain lines where the output is a file."""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

REDRAW_S = 0.1
BAR = 20  # characters


class Progress:
    """`with Progress(total, start) as progress:` – `step(row)` after every step, `note(text)` for anything else.

    On a terminal one line is redrawn at most ten times a second; elsewhere a line appears every `every` steps and at
    the end. With `enabled=False` (ranks other than 0) nothing is printed.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        every: int = 1,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.every, self.enabled = total, every, enabled
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._done = start
        self._from = (start, clock())  # where the average time of a step is taken from
        self._seconds_a_step: float | None = None  # none before the second step: the first measures no other
        self._steps = 0
        self._drawn = -math.inf
        self._line = ""
        if self._live and enabled and start < total:
            self._line = self._head()
            self._draw(clock())

    def step(self, row: dict[str, Any]) -> None:
        """Show a row of `Meter`."""
        now = self._clock()
        step, since = self._from
        self._done = row["step"]
        self._steps += 1
        if self._steps == 1:  # it also compiled and warmed up: not a measure for the others
            self._from = (self._done, now)
        else:
            self._seconds_a_step = (now - since) / max(1, self._done - step)
        if not self.enabled:
            return
        ended = self._done >= self.total
        if not self._live:
            if self._done % self.every == 0 or ended:
                self._print(f"step {self._done}/{self.total} ({self._percent()}%)  {self._numbers(row)}")
            return
        self._line = f"{self._head()}  {self._numbers(row)}"
        if now - self._drawn >= REDRAW_S or ended:
            self._draw(now)

    def note(self, text: str) -> None:
        """Print above the bar."""
        if self.enabled:
            self._print(text)
            if self._line:
                self._draw(self._clock())

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._line and self.enabled:
            self._draw(self._clock())
            self._write("\n")
            self._line = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _percent(self) -> int:
        return 100 * self._done // max(1, self.total)

    def _head(self) -> str:
        full, empty = ("█", "░") if "utf" in (getattr(self._stream, "encoding", "") or "").lower() else ("#", ".")
        filled = BAR * self._done // max(1, self.total)
        return f"{self._percent():3d}% {full * filled}{empty * (BAR - filled)} {self._done}/{self.total}"

    def _numbers(self, row: dict[str, Any]) -> str:
        parts = [f"loss {row['loss']:.4f}"]
        if row.get("reward") is not None:
            parts.append(f"reward {row['reward']:.3f}")
        if row.get("tokens_per_s") is not None:
            parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if row.get("mfu") is not None:
            parts.append(f"MFU {100 * row['mfu']:.0f}%")
        if row.get("peak_memory_gib") is not None:
            parts.append(f"peak {row['peak_memory_gib']:.1f} GiB")
        if self._seconds_a_step is not None:
            parts.append(f"{duration((self.total - self._done) * self._seconds_a_step)} left")
        return "  ".join(parts)

    def _draw(self, now: float) -> None:
        self._write("\r\033[K" + self._line[: shutil.get_terminal_size().columns - 1])
        self._drawn = now

    def _print(self, text: str) -> None:
        self._write(("\r\033[K" if self._live else "") + f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:04:00`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
