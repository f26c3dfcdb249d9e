"""Two nodes: two launchers that find each other, started by the Slurm script that ships, on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from parallel.processes import rows, wait_for_rows
from tiny_model import ROOT, steps, train, write_config, write_model, write_rows

FAKES = {  # what a cluster has: here both nodes are this machine
    "scontrol": 'if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >> "$REQUEUED"; fi',
    "srun": 'shift; trap "kill -USR1 \\$a \\$b" USR1; "$@" & a=$!; "$@" & b=$!\n'
    "wait $a; ca=$?; [ $ca -gt 128 ] && { wait $a; ca=$?; }; wait $b || true; exit $ca",
    "tune": f'exec {sys.executable} -m ftlib "$@"',
}


@pytest.fixture
def cluster(tmp_path):
    """A function: arguments of the script -> the job, as Slurm would start it."""
    for name, text in FAKES.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7",
        "RDZV_PORT": str(port), "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip

    def start(*words):
        return subprocess.Popen(
            ["bash", ROOT / "tools/slurm/train.sh", *map(str, words)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    return start


@pytest.fixture
def config(tmp_path):
    model, data = write_model(tmp_path / "model"), write_rows(tmp_path / "train.jsonl", 50)
    held_out = write_rows(tmp_path / "held_out.jsonl", 8, seed=1)
    return write_config(tmp_path / "config.yaml", model, data, held_out, steps=60, batch={"rows": 4, "micro_rows": 2})


def test_two_nodes_train_together_and_evaluate(cluster, config, tmp_path):
    job = cluster("recipes/full_sft.py", "--config", config, "parallel.tp=2", "steps=2")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    found = rows(tmp_path / "out")
    assert [row["step"] for row in found] == [0, 1, 2, 2] and found[-1]["eval_loss"] < found[0]["eval_loss"]


@pytest.mark.slow
def test_two_nodes_stop_before_the_limit_are_queued_again_and_go_on(cluster, config, tmp_path):
    """Last result (2026-11-22): passed."""
    out, words = tmp_path / "out", ("recipes/full_sft.py", "--config", config, "parallel.tp=2", "optim.lr=1e-3")
    job = cluster(*words)
    wait_for_rows(job, out, 10)
    srun = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(srun[0]), signal.SIGUSR1)
    said, errors = job.communicate(timeout=120)
    assert job.returncode == 75 and "stopped by SIGUSR1" in errors, errors
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    at = max(row["step"] for row in rows(out))
    job = cluster(*words, f"steps={at + 3}", "schedule.name=constant")
    said, errors = job.communicate(timeout=120)
    assert job.returncode == 0 and said.count("resuming from step_") == 1, errors
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, at + 4))

    alone = train("full_sft", "--config", config, "optim.lr=1e-3", f"output_dir={tmp_path / 'alone'}", "steps=9")
    found = rows(out)
    assert found[0]["eval_loss"] == pytest.approx(alone[0]["eval_loss"], rel=1e-5), "evaluated with shared matrices"
    assert steps(found)[:1] == pytest.approx(steps(alone)[:1], rel=1e-5)


def test_a_launcher_that_nobody_meets_ends_when_it_is_told(config):
    """It waits inside torch, where Python hears no signal."""
    with socket.socket() as deaf:  # takes connections and never answers
        deaf.bind(("127.0.0.2", 0))
        deaf.listen()
        words = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-conf", "is_host=false", "--rdzv-id", "nobody"]
        words += ["--rdzv-endpoint", f"127.0.0.2:{deaf.getsockname()[1]}", "recipes/full_sft.py", "--config", config]
        job = subprocess.Popen(
            [sys.executable, "-m", "ftlib", "run", *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert "2 nodes meet at 127.0.0.2:" in job.stdout.readline()
        deaf.accept()
        time.sleep(1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 128 + signal.SIGTERM
        job.stdout.close()
