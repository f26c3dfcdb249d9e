"""Asking a run to end: signals set a flag, the loop looks at it between two steps."""

import signal
import threading
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from ftlib.checkpoint.agree import Ranks, wire_device

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # schedulers send the first or the last before they kill
ECHO_S = 1.0  # one Ctrl-C reaches a worker twice: from the terminal, and passed on by torchrun


class StopFlag:
    """`with StopFlag() as stop:` – inside, those signals only set `stop.requested`; a second SIGINT (more than
    a second later) interrupts at once.

    Outside the main thread Python cannot install handlers: the flag then stays down unless someone sets it.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by: str | None = None  # name of the signal
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before.clear()

    def _set(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self.by, self._since = True, signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > ECHO_S:
            raise KeyboardInterrupt


def stop_agreed(run: Ranks, flag: StopFlag) -> bool:
    """Whether any rank was asked to stop, the same answer on all. Collective, once a step: one integer on the CPU."""
    if run.world == 1:
        return flag.requested
    asked = torch.tensor(int(flag.requested), dtype=torch.int32, device=wire_device(run))
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return bool(asked.item())
