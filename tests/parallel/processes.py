"""The real command with several processes, seen from outside: its workers by rank."""

import json
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
