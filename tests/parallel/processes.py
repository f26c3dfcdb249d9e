"""The real command with several processes, seen from outside: its workers by rank."""

import json
import os
import re
import signal
import time
from pathlib import Path


def worker(parent: int, rank: int) -> int:
    """Process id of a rank that `tune run` (process `parent`) has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def running(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def rows(out: Path) -> list[dict]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for_rows(process, out: Path, count: int, seconds: float = 200) -> None:
    """Until metrics.jsonl has `count` rows."""
    file, until = out / "metrics.jsonl", time.monotonic() + seconds
    while not (file.exists() and file.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def expect_a_hang_is_named(process, out: Path, limit: float) -> None:
    """Stop rank 1 of a run of two for good: within `limit` seconds the other ends the run and names it."""
    wait_for_rows(process, out, 12)
    first, second = worker(process.pid, 0), worker(process.pid, 1)
    os.kill(second, signal.SIGSTOP)
    since = time.monotonic()
    while running(first):
        time.sleep(0.05)
        assert time.monotonic() - since < limit, "longer than parallel.timeout_s"
    os.kill(second, signal.SIGKILL)  # the launcher would wait 30 s for it
    _, errors = process.communicate(timeout=150)
    assert re.search(r"nothing has moved for \d+ s .*: process 1 shows no sign of life .*step \d+", errors), errors
    assert "process 0 waits in" in errors and process.returncode == 76, errors
