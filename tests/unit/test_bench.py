"""The benchmarks run and are right where there is no GPU: small shapes, every contender that needs none."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Call a script of tools/bench with arguments."""
    monkeypatch.syspath_prepend(str(BENCH))

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        __import__(name).main()

    return call


def test_kernels(bench, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    bench("kernels", "--tiny", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    figures = [row for row in rows if "not_run" not in row]
    assert all(row["error"] < 1e-2 and (row["gradient_error"] or 0) < 1e-2 for row in figures)
    assert all(row["forward_ms"] > 0 for row in figures)
    ours = {row["kernel"] for row in figures if row["contender"] == "ours"}
    waiting = {row["kernel"] for row in rows if row.get("not_run") == "needs a GPU" and row["contender"] == "ours"}
    assert len(ours) == 13 and waiting == {"packed attention"}
    assert all(row["not_run"] == "needs a GPU" for row in rows if "not_run" in row)
    assert capsys.readouterr().out.count("\n") == len(rows)
