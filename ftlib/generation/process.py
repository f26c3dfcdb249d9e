"""A process of ours that draws: it answers calls over a pipe, leaves signals to the one that asks, and ends with it.

    python -m MODULE FD      with a socket at FD: pickled calls in, results out
"""

import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ftlib.errors import UserError

MEMORY = "/dev/shm"  # where weights pass through, if the machine has it and there is room: a container may have 64 MiB
LOOK_S = 1.0  # between two looks at whether the process that asks is still there
KEPT_FROM = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a terminal and a scheduler send them to all processes


class Worker:
    """The process of `module`, which calls `serve`. `made` is handed to its `start`; `env` is added to its environment.

    A call waits for the answer; to go on meanwhile, call from a thread. UserError with what went wrong over there.
    """

    def __init__(self, module: str, *made: Any, env: Mapping[str, str] | None = None) -> None:
        self._pipe, theirs = multiprocessing.connection.Pipe()
        path = os.pathsep.join(filter(None, (p or os.getcwd() for p in sys.path)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {}), "PYTHONPATH": path},
        )
        theirs.close()
        self.call(*made)

    def call(self, *message: Any) -> Any:
        """The result of the handler that `message` names, for what stands behind the name."""
        try:
            self._pipe.send(message)
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(f"the process that draws ended with code {self.process.wait()}") from None
        if kind == "error":
            raise UserError(f"the process that draws: {value}")
        return value

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._pipe.close()


def passing(size: int) -> tempfile.TemporaryDirectory[str]:
    """A folder for what is handed over: in memory where there is room for `size` bytes and some more, else on disk."""
    roomy = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 1.05 * size + 2**20
    return tempfile.TemporaryDirectory(dir=MEMORY if roomy else None)


def serve(fd: str, start: Callable[..., Mapping[str, Callable[..., Any]]]) -> None:
    """Answer calls of the handlers that `start` gives, until the other end closes or one of them fails. Signals are
    left to it: it needs what it asked for before it saves.

    One that was killed says nothing: what it asked for last is dropped too.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for number in KEPT_FROM:
        signal.signal(number, signal.SIG_IGN)
    pipe = multiprocessing.connection.Connection(int(fd))
    handlers: Mapping[str, Callable[..., Any]] | None = None
    said: tuple[str, Any] = ("ok", None)
    while said[0] == "ok":
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if handlers is None:
                handlers, said = start(*message), ("ok", None)
            else:
                said = "ok", handlers[message[0]](*message[1:])
        except Exception as error:
            said = "error", f"{type(error).__name__}: {error}"
        try:
            pipe.send(said)
        except OSError:
            return


def _end_with(parent: int) -> None:
    """End this process as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
