"""The real command, killed and stopped: it goes on by itself and its numbers are those of a run never stopped."""

import json
import os
import random
import signal
import time

import pytest
from tiny_model import command, losses, tune, write_config, write_model, write_rows

STEPS = 40


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function: output folder -> the arguments of the command. Dropout, so that generators matter too."""
    folder = tmp_path_factory.mktemp("resume")
    model, rows = write_model(folder / "model"), write_rows(folder / "train.jsonl", 50)
    file = write_config(
        folder / "config.yaml", model, rows, write_rows(folder / "held_out.jsonl", 8, seed=1),
        steps=STEPS, lora={"dropout": 0.1}, checkpoint={"every": 3}, eval={"every": 15},
    )  # fmt: skip
    return lambda out, *more: ("run", "recipes/lora_sft.py", "--config", file, f"output_dir={out}", *more)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """What a run gives that nobody stops: rows without times, and the adapter's bytes."""
    out = tmp_path_factory.mktemp("whole")
    code, _, errors = tune(*start(out))
    assert code == 0, errors
    return result(out)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(out):
    clocked = ("tokens_per_s", "data_wait")
    exact = [{key: value for key, value in row.items() if key not in clocked} for row in rows(out)]
    return exact, (out / "final" / "adapter_model.safetensors").read_bytes()


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_rows(process, out, more):
    """Until `more` rows were written; a resumed run first drops some."""
    seen, low = 0, lines(out)
    while process.poll() is None and seen < more:
        time.sleep(0.002)
        now = lines(out)
        seen, low = seen + max(0, now - low), now


def interrupted(start, out, number, more):
    """Start, send a signal after `more` rows, end; (exit code, output, errors)."""
    process = command(*start(out, "checkpoint.background=true"))  # the run that is never stopped waits for its saves
    wait_for_rows(process, out, more)
    process.send_signal(number)
    out_text, errors = process.communicate(timeout=120)
    return process.returncode, out_text, errors


def test_stopped_and_killed_runs_equal_one_that_never_was(start, whole, tmp_path):
    code, _, errors = interrupted(start, tmp_path, signal.SIGTERM, 5)
    assert code == 75, errors
    assert errors.startswith("stopped by SIGTERM after step ") and "Traceback" not in errors
    at = int(errors.split("after step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / f"step_{at:06d}").is_dir()
    code, said, _ = interrupted(start, tmp_path, signal.SIGKILL, 8)
    assert code == -signal.SIGKILL
    assert f"resuming from step_{at:06d}" in said
    newest = max((tmp_path / "checkpoints").glob("step_*"))
    for waiting in (tmp_path / "checkpoints").glob(".tmp_step_*"):  # else one that lacks only its name is the newest
        (waiting / "MANIFEST.json").unlink(missing_ok=True)
    shard = next(newest.glob("shard-*"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    code, said, errors = tune(*start(tmp_path))
    assert code == 0, errors
    assert f"skip {newest.name}: " in said and "checksum mismatch" in said
    assert losses(rows(tmp_path)) == losses(whole[0])
    assert result(tmp_path) == whole


@pytest.mark.slow
def test_twenty_random_kills(start, whole, tmp_path):
    """Last result: 20 kills over 40 steps, every loss, norm and evaluation and the adapter's bytes equal."""
    dice, kills = random.Random(int(os.environ.get("KILL_SEED", "20"))), 0
    while kills < 20:
        background = f"checkpoint.background={dice.choice(('true', 'false'))}"
        process = command(*start(tmp_path, "checkpoint.every=1", background))
        if dice.random() < 0.25:  # at any moment: imports, loading, resuming
            time.sleep(dice.uniform(0.2, 5.0))
        else:
            wait_for_rows(process, tmp_path, dice.randint(1, 3))
            time.sleep(dice.uniform(0.0, 0.05))
        assert process.poll() is None, f"ended before kill {kills + 1}: {process.communicate()}"
        process.kill()
        process.communicate()
        kills += 1
    code, _, errors = tune(*start(tmp_path, "checkpoint.every=1"))
    assert code == 0, errors
    assert result(tmp_path) == whole
