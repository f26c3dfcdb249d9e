"""The run on eight GPUs: its plan stands on what was measured, and its script works where there is no GPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def headline():
    """The script as a module; `parallel` is a file beside it, and elsewhere in the tests a folder."""
    path, others = list(sys.path), {name: sys.modules.pop(name) for name in list(sys.modules) if _parallel(name)}
    sys.path.insert(0, str(BENCH))
    found = importlib.import_module("headline")
    sys.path[:] = path
    for name in filter(_parallel, list(sys.modules)):
        del sys.modules[name]
    sys.modules |= others
    return found


def _parallel(name):
    return name.split(".")[0] == "parallel"


@pytest.fixture(scope="module")
def plan(headline, tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    headline.plan(8, out)
    return json.loads(out.read_text())


def test_the_plan_that_is_kept_is_what_the_estimate_says(headline, plan):
    assert plan == json.loads(headline.PLAN.read_text()), "headline.py --plan, and its table in LOG.md"


def test_the_estimate_is_near_what_one_and_two_gpus_measured(plan):
    checks = plan["checks"]
    assert len(checks) == 11
    for name, row in checks.items():  # quantized ones ran while backward still repeated a product
        assert abs(row["speed_error_percent"]) < (11 if "qlora" in name else 5), name
    # One ran with tiles of logits a quarter as large as those of today.
    assert sorted(abs(row["memory_error_percent"]) for row in checks.values())[-2] < 5
    sharded = checks["h200 70b/dp_shard=2"]["exposed_ms"]
    assert sharded[0] < 2 * sharded[1] and min(plan["link_bytes_per_s"].values()) > 150e9


def test_the_plan_holds_together(plan):
    runs = {name: row for name, row in plan["runs"].items() if "refused" not in row}
    for name, row in runs.items():
        assert sum(row["memory_gib"].values()) == pytest.approx(row["total_gib"], abs=0.3), name
        assert row["step_s"] == pytest.approx(sum(row["compute_s"].values()) + sum(row["exposed_s"].values()), abs=0.01)
        tokens = row["work"]["rows"] * row["work"]["seq_len"] / int(name.split("@")[1])
        assert tokens == (16384 if "32k" in name else 8192), "the same work for each GPU"
        assert row["tokens_per_s_per_gpu"] == pytest.approx(tokens / row["step_s"], rel=2e-3)
    one, eight = runs["70b/fsdp@1"], runs["70b/fsdp@8"]
    assert eight["memory_gib"]["weights"] == pytest.approx(one["memory_gib"]["weights"] / 8, abs=0.1)
    assert not one["fits"] and len(eight["fits"]) == 3
    assert {"weights", "tp"} < eight["received_gib_per_step"].keys() | runs["70b/fsdp-tp2@8"][
        "received_gib_per_step"
    ].keys()
    # 7 of 8 parts of the blocks, forward and backward, and of embedding and head, in bf16
    assert eight["received_gib_per_step"]["weights"] == pytest.approx(
        7 / 8 * 2 * (2 * 68.66e9 + 2 * 1.05e9) / 2**30, rel=0.01
    )


def test_what_does_not_fit_or_go_together_is_a_row_that_says_so(headline, monkeypatch):
    monkeypatch.setattr(headline.preflight, "available", lambda: ("the GPU", 78 << 30, 1))
    monkeypatch.setattr(headline.parallel, "run", lambda work, limit: {"failed": "stopped here", "work": work})
    rows = {
        name: headline.measured(name, work, 10, "", 200e9)
        for name, work in headline.cases(8, ["70b", "8b-full"]).items()
    }
    assert "about 85" in rows["70b/fsdp@2"]["skipped"] and "the GPU has 78" in rows["70b/fsdp@2"]["skipped"]
    assert {name for name, row in rows.items() if "failed" in row} == {
        "70b/fsdp@8", "70b/fsdp-tp2@8", "8b-full/fsdp@1", "8b-full/fsdp@2", "8b-full/fsdp@8",
    }  # fmt: skip


def run(folder, *words):
    out = folder / "rows.json"
    command = [sys.executable, str(BENCH / "headline.py"), "--tiny", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_it_runs_on_two_processes(tmp_path):
    """Last result (2026-11-22): passed."""
    rows = run(tmp_path, "--gpus", "2", "--only", "70b-qlora-32k")
    row = rows["70b-qlora-32k/fsdp-cp2@2"]
    assert row["processes"] == 2 and row["tokens_per_s"] > 0 and row["start_s"] > row["first_step_s"]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [2, 4])
def test_it_runs_whole(gpus, tmp_path):
    """Every group, and checkpoints; meshes of one group train alike."""
    rows = run(tmp_path, "--gpus", str(gpus), "--save", str(tmp_path), "--limit", "250")
    assert not any("failed" in row for row in rows.values())
    assert all(row["agrees"] for row in rows.values() if "agrees" in row) and f"70b/fsdp-tp2@{gpus}" in rows
    assert rows[f"8b-full/fsdp@{gpus}"]["save_total_s"] and rows[f"70b/fsdp@{gpus}"]["times_1"] > 0
