"""A run that is killed tells nobody: what it had started ends by itself all the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel.processes import rows, running, wait_for_rows
from tiny_model import ROOT, command

from ftlib.generation import process
from ftlib.rl import sandbox
from ftlib.rl.rewards import worker

KILLED = "import os, signal, threading\nthreading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
DRAWS = """
import torch
from ftlib import models
from ftlib.generation import SamplingParams
from ftlib.generation.remote import RemoteEngine
engine = RemoteEngine(models.from_pretrained("ftlib:demo/model"), torch.device("cpu"), 8)
engine.load()
"""
STUCK = """
import os, re, signal
def stuck(completions, **columns):
    print("called", flush=True)
    os.kill(os.getppid(), signal.SIGKILL)
    re.match("(a+)+$", "a" * 60 + "b")  # holds Python's lock for ages
"""


def left(mark):
    """Processes whose environment or command line holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            held = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        found += [int(folder.name)] if mark.encode() in held and running(int(folder.name)) else []
    return found


def ends(code, folder, seconds=60, kill=False):
    """What a process says that kills itself, or is killed once it has said a line and then started another, of which
    nothing is left in the end; `seconds` are what a busy machine may take for it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    seen = set()
    if kill:
        process.stdout.readline()
    while process.poll() is None:
        seen |= set(left(str(folder)))
        time.sleep(0.3)
        if kill and len(seen) > 1:
            time.sleep(2)  # what was started is at its work by then
            process.kill()
    seen |= set(left(str(folder)))  # what it started outlives it for a moment, and a busy machine looks late
    assert process.returncode == -signal.SIGKILL and len(seen) > 1, "killed, and it had started something"
    until = time.monotonic() + seconds
    while left(str(folder)) and time.monotonic() < until:
        time.sleep(0.3)
    survivors = left(str(folder))
    for number in survivors:
        os.kill(number, signal.SIGKILL)
    assert not survivors
    return process.communicate()[0]


def test_a_process_that_draws_ends_in_the_middle_of_its_batch(tmp_path):
    """It is asked for minutes of work."""
    code = f"{DRAWS}{KILLED}engine.generate([[5]] * 8, SamplingParams(20_000))"
    ends(code, tmp_path, 30 * process.LOOK_S)


def test_a_reward_that_hangs_ends_soon_after_its_time(tmp_path):
    (tmp_path / "own.py").write_text(STUCK)
    code = "from ftlib.rl.rewards.worker import Worker\n"
    code += f"Worker('rewards', '{tmp_path}/own.py:stuck').call(2.0, completions=['a'])"
    assert ends(code, tmp_path, 10 * (2 + worker.LATE_S)) == "called\n"


@pytest.mark.skipif(not sandbox.isolated(), reason="this machine gives no namespaces")
def test_code_of_a_model_that_sleeps_ends_with_the_reward_that_ran_it(tmp_path):
    code = "from ftlib.rl import sandbox\nprint(sandbox.isolated(), flush=True)\n"
    code += "sandbox.passed('import time\\ntime.sleep(600)', ['pass'], 600, 512)"
    ends(code, tmp_path, kill=True)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_of_grpo_that_was_killed_goes_on_to_the_bit(staleness, tmp_path):
    """The real command, killed after its third step; nothing of it is left. Last passed 2026-11-22."""

    def start(name):
        run = ["run", "recipes/grpo.py", "--config", "configs/demo_grpo.yaml", "data.eval=null", "checkpoint.every=1"]
        run += ["steps=5", "rollout.prompts=4", f"rollout.staleness={staleness}", f"output_dir={tmp_path / name}"]
        return command(*run, cwd=ROOT, env={"TMPDIR": str(tmp_path)})

    process = start("killed")
    wait_for_rows(process, tmp_path / "killed", 3)
    process.kill()
    process.communicate(timeout=10)  # which waits for all that hold its output
    assert not left(f"TMPDIR={tmp_path}")
    for name in ("killed", "whole"):
        process = start(name)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    keys = ("loss", "reward", "grad_norm", "tokens", "staleness", "length/mean")
    runs = [[[row[key] for key in keys] for row in rows(tmp_path / name)] for name in ("killed", "whole")]
    assert len(runs[0]) == 5 and runs[0] == runs[1]
    finals = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert finals[0] == finals[1]
