"""The row of a training step: the same numbers with the same meaning in every recipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Devices(Protocol):
    """The part of a Run that a meter looks at."""

    device: torch.device
    world: int


class Meter:
    """Makes step rows. It never waits for the device: the recipe has read the loss, so the step's work is done.

    `flops_per_token` is `observe.flops_per_token(…)`, `peak_flops` one device's FLOP/s; without either `mfu` is null.
    `memory`: most bytes that were in use on the device so far.
    """

    def __init__(
        self,
        run: Devices,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        memory: Callable[[], int] = torch.cuda.max_memory_allocated,
    ) -> None:
        self.run, self._memory = run, memory
        self.tokens = 0  # trained so far, over all devices and restarts
        self._flops, self._peak, self._clock = flops_per_token, peak_flops, clock
        self._since = clock()
        self._waited: float | None = None  # seconds of this step; None in recipes that do not measure it

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a step waits for its data. Rows then have `data_wait`, the share of a step's time."""
        since = self._clock()
        yield
        self._waited = (self._waited or 0.0) + self._clock() - since

    def start(self) -> None:
        """A step begins now; without it the time since the last row counts, evaluation and saving included."""
        self._since = self._clock()
        self._waited = None if self._waited is None else 0.0

    def row(self, step: int, loss: float, grad_norm: float, lr: float, tokens: int) -> dict[str, Any]:
        """`step loss grad_norm lr tokens tokens_per_s mfu peak_memory_gib`, null where unknown.

        `tokens` are this step's over all devices; the row has their running total. Call it after reading the loss.
        """
        now = self._clock()
        seconds, self._since = now - self._since, now
        self.tokens += tokens
        speed = tokens / seconds if seconds > 0 else None
        mfu = None
        if speed is not None and self._flops and self._peak:
            mfu = speed * self._flops / (self._peak * self.run.world)
        memory = None
        if self.run.device.type == "cuda":
            memory = self._memory() / 2**30
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_s": speed,
            "mfu": mfu,
            "peak_memory_gib": memory,
        }
        if self._waited is not None:
            row["data_wait"] = self._waited / seconds if seconds > 0 else None
            self._waited = 0.0
        return row
