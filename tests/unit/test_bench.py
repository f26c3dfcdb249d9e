"""The benchmarks run: our contenders at sizes that a CPU does in seconds, the rows written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "rows"),
    [("dpo", ["ftlib", "ftlib, shared", "ftlib"]), ("grpo --quantize none,nf4", ["ftlib", "ftlib, nf4"])],
)
def test_a_benchmark_runs_whole(script, rows, tmp_path):
    name, *more = script.split()
    command = [
        sys.executable,
        str(BENCH / f"{name}.py"),
        "--tiny",
        "--vs",
        "",
        *more,
        "--out",
        str(tmp_path / "rows.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["contender"] for row in written] == rows
    assert all(row.get("agrees", True) for row in written)


def test_every_row_names_a_script_and_every_result_of_one_gpu_a_row():
    done = subprocess.run(
        [sys.executable, str(BENCH / "every_row.py"), "--list"], capture_output=True, text=True, timeout=60, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [line[3] for line in lines]
    assert len(set(names)) == len(names)
    assert all((BENCH / line[4]).is_file() for line in lines)
    measured = {file.stem.replace("h200", "h100") for file in (BENCH / "results").glob("*h[12]00*.json")}
    assert {name for name in measured if "h100x2" not in name} <= set(names)


def test_packed_documents_are_the_same_steps_for_everyone(tmp_path):
    command = [sys.executable, str(BENCH / "packed.py"), "--tiny", "--vs", "", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    about = row["documents"]
    assert sum(row["real_tokens"]) == about["tokens"]  # real ones alone
    assert len(row["real_tokens"]) == about["steps"] and max(row["real_tokens"]) - min(row["real_tokens"]) < 8
    assert row["padding"] == round(1 - about["tokens"] / (about["steps"] * about["rows"] * about["seq_len"]), 4)
    assert 0 < row["loss"][1] < 7 and row["agrees"]


def test_gradients_in_8_bits_are_about_as_long(tmp_path):
    command = [sys.executable, str(BENCH / "fp8_gradient.py"), "--tiny", "--out", str(tmp_path / "norms.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    norms = json.loads((tmp_path / "norms.json").read_text())["norms"]
    for plain, tensorwise, rowwise in zip(*norms.values(), strict=True):
        for other in (tensorwise, rowwise):
            assert other.keys() == plain.keys() and all(abs(other[part] / plain[part] - 1) < 0.03 for part in plain)
            assert other["all"] != plain["all"]
