"""Start the processes of a world and collect what each of them found."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from parallel.grid import Case
from tiny_model import ROOT, environment


def run(
    world: int, cases: list[Case], models: Path, out: Path, timeout: float = 600, gpus: bool = False,
    legs: list[tuple[str, int, int]] | None = None,
) -> list[list[dict]]:  # fmt: skip
    """Reports of all ranks, one entry a case; AssertionError with the traceback if a process failed.

    `legs`: for each case a folder and the steps from and to which it goes on there, instead of a run of its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = [(asdict(case), leg) for case, leg in zip(cases, legs or [None] * len(cases), strict=True)]
    words = [out / "store", models, out, json.dumps(work)]
    processes(Path(__file__).parent / "worker.py", world, words, out, timeout, gpus)
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(world)]


def processes(
    script: Path, world: int, words: Sequence[object], logs: Path, timeout: float = 300, gpus: bool = False
) -> None:
    """`script RANK WORLD WORDS…` in a process for each rank; AssertionError with the end of its log if one failed."""
    env = environment() | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    workers = []
    for rank in range(world):
        command = [sys.executable, *map(str, (script, rank, world, *words))]
        log = (logs / f"log_{rank}").open("w")
        workers.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        codes = [worker.wait(timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (logs / f"log_{rank}").read_text()[-6000:]
