"""The process that a reward function, an environment or tools run in: it can hang, crash or be killed alone.

    python -m ftlib.rl.rewards.worker FD      with a socket at FD: pickled calls in, results out

The first message is the function, (group, reference), each further one a call of it, (seconds, args, kwargs). A result
is ("ok", value) or ("error", text).
"""

import asyncio
import faulthandler
import inspect
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ftlib import plugins
from ftlib.errors import UserError

START_S = 60.0  # for the process to come up and import the function
LATE_S = 5.0  # beyond the time of a call, when a process whose parent was killed ends by itself


class Failed(Exception):
    """The function raised; the text says what and where."""


class Died(Failed):
    """Its process ended."""


class TooSlow(Exception):
    """No answer within the time."""


def find(group: str, ref: str) -> Callable[..., Any]:
    """The function that a config names."""
    from ftlib.rl.rewards import BUILTIN

    return plugins.find(group, ref, BUILTIN if group == "rewards" else {})


class Worker:
    """`worker.call(seconds, *args, **kwargs)` runs the function in a process, which is started when it is needed."""

    def __init__(self, group: str, ref: str) -> None:
        self.group, self.ref = group, ref
        self._process: subprocess.Popen | None = None
        self._pipe: multiprocessing.connection.Connection | None = None

    def call(self, seconds: float, /, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. `Failed` if it raises, `Died` if its process does, `TooSlow` after `seconds`."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((seconds, args, kwargs))
            if not self._pipe.poll(seconds):
                self.stop()
                raise TooSlow(f"{self.ref} gave no answer within {seconds:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            code = self.stop()
            raise Died(f"{self.ref}: its process ended with code {code}") from None
        if kind == "error":
            raise Failed(f"{self.ref}: {value}")
        return value

    def stop(self) -> int | None:
        """End the process and all that it started; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._pipe.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return process.wait()

    def _start(self) -> None:
        ours, theirs = multiprocessing.connection.Pipe()
        command = [sys.executable, "-m", "ftlib.rl.rewards.worker", str(theirs.fileno())]
        path = os.pathsep.join(filter(None, (p or os.getcwd() for p in sys.path)))
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        self._pipe = ours
        ours.send((self.group, self.ref))
        try:
            kind, value = ours.recv() if ours.poll(START_S) else ("error", f"it did not start within {START_S:g} s")
        except EOFError:
            kind, value = "error", "its process ended while it started"
        if kind == "error":
            self.stop()
            raise UserError(f"{self.ref}: {value}")


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Answer calls until the other end closes; where nobody is left to end one that hangs, the process does."""
    try:
        function = find(*pipe.recv())
        pipe.send(("ok", None))
    except UserError as error:
        pipe.send(("error", str(error)))
        return
    while True:
        try:
            seconds, args, kwargs = pipe.recv()
        except EOFError:
            return
        # A thread of C: it needs no lock that a hanging function may hold.
        faulthandler.dump_traceback_later(seconds + LATE_S, exit=True)
        try:
            value = function(*args, **kwargs)
            pipe.send(("ok", asyncio.run(value) if inspect.iscoroutine(value) else value))
        except UserError as error:
            pipe.send(("error", str(error)))
        except BaseException as error:
            pipe.send(("error", f"{type(error).__name__}: {error} ({_place()})"))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _place() -> str:
    """`file:line` of the innermost frame of the exception that is handled."""
    frame = traceback.extract_tb(sys.exc_info()[2])[-1]
    return f"{frame.filename}:{frame.lineno}"


if __name__ == "__main__":
    serve(multiprocessing.connection.Connection(int(sys.argv[1])))
