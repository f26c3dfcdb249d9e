"""Lanes made in processes of their own: each worker makes the rows of some lanes, in order, and sends them."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ftlib.data.stream_rows import Lane, Packed, Reader, StreamPlan, first_state
from ftlib.errors import UserError

ENDED = "a process that reads and tokenises ended without a word"
PIPE_BYTES = 1 << 20  # rows that a worker may be ahead
_F_SETPIPE_SZ = 1031  # Linux


def make_lanes(plan: StreamPlan, own: Sequence[int], states: Sequence[dict[str, Any] | None]) -> list[Lane]:
    """Lanes `own` (of `states` the entries in the same order) over readers that they share."""
    states = [state or first_state(plan, number) for number, state in zip(own, states, strict=True)]
    readers = []
    for i, source in enumerate(plan.sources):
        first = min(states, key=lambda state: state["cursors"][i][:2])
        readers.append(Reader(source, plan, own, tuple(first["cursors"][i][:2]), first["marks"][i]))
    return [Lane(plan, number, readers, state) for number, state in zip(own, states, strict=True)]


def next_rows(lanes: Sequence[Lane]) -> list[Packed]:
    """One row of each lane; blocks that all lanes have passed are dropped."""
    rows = [lane.row() for lane in lanes]
    for source, reader in enumerate(lanes[0].readers):
        reader.forget(min((lane.cursors[source][0], lane.cursors[source][1]) for lane in lanes))
    return rows


class Workers:
    """Processes for lanes `own`; `rows()` gives their next rows in order. `close` ends them."""

    def __init__(
        self,
        plan: StreamPlan,
        own: Sequence[int],
        states: Sequence[dict[str, Any] | None],
        workers: int,
    ) -> None:
        self._places = [list(range(number, len(own), workers)) for number in range(min(workers, len(own)))]
        self._count = len(own)
        # Forked, so that a tokenizer need not be sent; a worker touches no device.
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe(duplex=False) for _ in self._places]
        self._ends = [receive for receive, _ in pipes]
        self._processes = []
        for places, (_, send) in zip(self._places, pipes, strict=True):
            others = [*self._ends, *(end for _, end in pipes if end is not send)]
            part = (plan, [own[i] for i in places], [states[i] for i in places], send, others)
            process = context.Process(target=_work, args=part, daemon=True)
            process.start()
            self._processes.append(process)
        for _, send in pipes:
            send.close()
        self._end = weakref.finalize(self, _terminate, self._processes)  # also when nobody wants rows any more

    def rows(self) -> list[Packed]:
        """The next row of each lane. UserError as the worker met it; RuntimeError when one ended."""
        found: list[Packed | None] = [None] * self._count
        for places, end in zip(self._places, self._ends, strict=True):
            try:
                message = end.recv()
            except (EOFError, OSError):
                raise RuntimeError(ENDED) from None
            if isinstance(message, dict):
                if "trace" in message:
                    raise RuntimeError(f"a process that reads and tokenises failed:\n{message['trace']}")
                raise UserError(message["what"], where=message["where"], fix=message["fix"])
            for place, row in zip(places, message, strict=True):
                found[place] = row
        return found

    def close(self) -> None:
        """End the processes; what they made and nobody took is made again by whoever continues."""
        self._end()


def _terminate(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _work(
    plan: StreamPlan,
    own: Sequence[int],
    states: Sequence[dict[str, Any] | None],
    send: Connection,
    others: Sequence[Connection],
) -> None:
    # The parent decides when a run ends; its handlers, which are inherited, would keep this process alive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for end in others:  # so that a parent that was killed leaves a pipe that nobody reads, which ends this process
        end.close()
    with contextlib.suppress(OSError):
        fcntl.fcntl(send.fileno(), _F_SETPIPE_SZ, PIPE_BYTES)
    try:
        lanes = make_lanes(plan, own, states)
        while True:
            send.send(next_rows(lanes))
    except UserError as error:
        send.send({"what": error.what, "where": error.where, "fix": error.fix})
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except Exception:
        send.send({"trace": traceback.format_exc()})
