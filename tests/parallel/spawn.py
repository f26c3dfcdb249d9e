"""Start the processes of a world and collect what each of them found."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from parallel.grid import Case

ROOT = Path(__file__).parents[2]


def run(world: int, cases: list[Case], models: Path, out: Path, timeout: float = 600) -> list[list[dict]]:
    """Reports of all ranks, one entry a case; AssertionError with the traceback if a process failed."""
    out.mkdir(parents=True, exist_ok=True)
    words = [str(out / "store"), str(models), str(out), json.dumps([asdict(case) for case in cases])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = []
    for rank in range(world):
        command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(rank), str(world), *words]
        log = (out / f"log_{rank}").open("w")
        workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        codes = [worker.wait(timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (out / f"log_{rank}").read_text()[-6000:]
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(world)]
