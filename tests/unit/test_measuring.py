"""The benchmarks run and are right where there is no GPU: small shapes, every contender that needs none."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

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
    assert len(ours) == 14 and waiting == {"packed attention", "AdamW, states in int8"}
    assert all(row["not_run"] == "needs a GPU" for row in rows if "not_run" in row)
    assert capsys.readouterr().out.count("\n") == len(rows)


def test_context(bench, tmp_path):
    out = tmp_path / "context.json"
    bench("context", "--tiny", "--out", str(out))
    bench("context", "--tiny", "--out", str(out))  # the same curve, not a second one
    curve = json.loads(out.read_text())["curves"]["tiny"]
    assert [row["tokens"] for row in curve] == [64, 128, 256]
    assert all(5 < row["loss"] < 7 and row["peak_gib"] > 0 for row in curve)
    drawn = ElementTree.fromstring((tmp_path / "context.svg").read_text())
    assert len(drawn.findall("{*}circle")) == 3


def test_context_says_why_it_stopped(bench, tmp_path):
    bench("context", "--tiny", "--limit", "0", "--out", str(tmp_path / "c.json"))
    found = json.loads((tmp_path / "c.json").read_text())["curves"]["tiny"]
    assert found == [{"tokens": 64, "failed": "not begun: it would not end within 0 s"}]
    import context

    def step(tokens: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.\nmore")

    assert context.figures(step, 64) == {"failed": "out of memory: CUDA out of memory. Tried to allocate 16.00 GiB."}


@pytest.mark.parametrize(
    ("asked", "peers"),
    [
        ([], ["plain"]),
        (["--peer-path", "torchtitan=/x"], ["plain", "torchtitan"]),
        (["--vs", "torchtitan"], ["torchtitan"]),
    ],
)
def test_pretraining_has_the_peers_asked_for_between_two_of_ours(bench, monkeypatch, asked, peers):
    import sft  # beside the scripts, where `bench` looks

    scripts = []

    def run(script: str, work: dict, paths: dict, limit: int) -> dict:
        scripts.append((script, paths))
        return {"contender": script, "failed": "stopped here"}

    monkeypatch.setattr(sft, "run", run)
    bench("pretrain", "--steps", "0", *asked)
    assert [script for script, _ in scripts] == ["ours", *(f"{peer}_peer" for peer in peers), "ours"]
    assert all(paths == ({"torchtitan": "/x"} if "--peer-path" in asked else {}) for _, paths in scripts)
    assert all((BENCH / f"{script}.py").is_file() for script, _ in scripts)


def test_starts_may_write_bytecode(bench, tmp_path, monkeypatch):
    """Where they may not, each would compile every package's source."""
    import startup  # beside the scripts, where `bench` looks

    class Seen(Exception):
        pass

    def popen(command, env, **more):
        raise Seen(env)

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(startup.subprocess, "Popen", popen)
    with pytest.raises(Seen) as seen:
        startup.started("cold", tmp_path / "config.yaml", 1)
    env = seen.value.args[0]
    assert env["PYTHONDONTWRITEBYTECODE"] == "" and env["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache")


@pytest.mark.slow
def test_startup(bench, tmp_path):
    """Last result (2026-11-22): passed."""
    out = tmp_path / "startup.json"
    bench("startup", "--tiny", "--runs", "warm,resumed", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["run"] for row in rows] == ["warm", "resumed"]
    assert all(0.5 < row["seconds"] < 100 for row in rows), rows
