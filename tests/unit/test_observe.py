"""What a run says: exact rows, readable progress, work counted by one rule."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ftlib.errors import UserError
from ftlib.evaluation import metrics
from ftlib.observe import (
    Meter,
    MetricsFile,
    Progress,
    count_weights,
    device_peak,
    environment,
    flops_per_token,
)
from ftlib.observe.output import loss_note
from ftlib.observe.progress import duration
from ftlib.sections import Checkpoint, Distill, Dpo, Eval, Loss, Mtp, Reward, Source, Stream


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def cpu(world=1):
    return SimpleNamespace(device=torch.device("cpu"), world=world)


def test_rows_are_exact_and_strict(tmp_path):
    metrics = MetricsFile(tmp_path / "new")
    loss = 1 / 3
    metrics.write({"step": 1, "loss": loss, "mfu": None, "norm": torch.tensor(0.1), "n": np.int64(3)})
    metrics.write({"step": 2, "loss": float("nan"), "tasks": {"a": float("inf"), "b": [1.0, -float("inf")]}})
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = metrics.rows()
    assert first["loss"] == loss and first["norm"] == torch.tensor(0.1).item() and first["n"] == 3
    assert second["loss"] is None and second["tasks"] == {"a": None, "b": [1.0, None]}
    assert second["nonfinite"] == ["loss", "tasks.a", "tasks.b.1"]


def test_rows_of_later_steps_and_torn_lines_go_on_resume(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.truncate_after(3)  # nothing there yet
    for step in range(6):
        metrics.write({"step": step, "loss": step / 7})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    metrics.truncate_after(3)
    assert path.read_text().splitlines() == before[:4], "untouched text, not re-encoded"
    metrics.write({"step": 4})
    assert [row["step"] for row in metrics.rows()] == [0, 1, 2, 3, 4]
    metrics.truncate_after(-1)
    assert metrics.rows() == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    metrics = MetricsFile(tmp_path / "out", enabled=False)
    metrics.write({"step": 1})
    metrics.truncate_after(0)
    assert metrics.rows() == [] and not (tmp_path / "out").exists()


def test_meter_row():
    clock = Clock()
    meter = Meter(cpu(world=2), flops_per_token=50.0, peak_flops=1000.0, clock=clock)
    clock.now += 60  # loading
    meter.start()
    clock.now += 2
    row = meter.row(1, 3.0, 0.5, 1e-4, tokens=40)
    assert list(row) == ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "peak_memory_gib"]
    assert row["tokens_per_s"] == 20.0 and row["tokens"] == 40
    assert row["mfu"] == 20.0 * 50.0 / (1000.0 * 2)
    assert row["peak_memory_gib"] is None
    meter.tokens += 1000  # as a resumed run sets it
    clock.now += 1
    assert meter.row(2, 3.0, 0.5, 1e-4, tokens=40)["tokens"] == 1080
    assert Meter(cpu(), clock=clock).row(1, 0.0, 0.0, 0.0, 5)["tokens_per_s"] is None, "no time passed"
    assert Meter(cpu()).row(1, 0.0, 0.0, 0.0, 5)["mfu"] is None


def test_waiting_for_data_is_a_share_of_the_step():
    clock = Clock()
    meter = Meter(cpu(), clock=clock)
    assert "data_wait" not in meter.row(1, 0.0, 0.0, 0.0, 5)
    for waits, rest, share in (((2.0, 1.0), 7.0, 0.3), ((0.0,), 4.0, 0.0), ((1.0,), 1.0, 0.5)):
        for seconds in waits:
            with meter.waiting():
                clock.now += seconds
        clock.now += rest
        assert meter.row(2, 0.0, 0.0, 0.0, 5)["data_wait"] == share
    with meter.waiting():
        clock.now += 9.0
    meter.start()  # after an evaluation, say: a new step
    clock.now += 1.0
    assert meter.row(3, 0.0, 0.0, 0.0, 5)["data_wait"] == 0.0


def test_flops_by_the_rule():
    # Llama-3.1-8B without its embedding: 32 layers, 32 heads of 128; LoRA of rank 16 on every projection.
    body_and_head, lora, layers = 7_504_658_432, 41_943_040, [(4096, None)] * 32
    assert flops_per_token(body_and_head, lora, layers, 4096) == 4 * body_and_head + 6 * lora + 6 * 4096 * 4096 * 32
    assert round(flops_per_token(body_and_head, lora, layers, 4096) / 1e9) == 33
    assert flops_per_token(0, 10, [], 128) == 60
    # A window of one key costs one key; a window as long as the sequence changes nothing.
    assert flops_per_token(0, 0, [(8, 64)], 64) == flops_per_token(0, 0, [(8, None)], 64)
    exact = sum(min(position + 1, 16) for position in range(256)) / 256
    assert flops_per_token(0, 0, [(8, 16)], 256) / (12 * 8) == pytest.approx(exact, rel=0.04)


def test_count_weights():
    def model(tied):
        parts = nn.ModuleDict({"embed": nn.Embedding(10, 4), "up": nn.Linear(4, 6)})
        parts["head"] = nn.Linear(4, 10, bias=False)
        if tied:
            parts["head"].weight = parts["embed"].weight
        parts["up"].requires_grad_(False)
        return parts

    assert count_weights(model(tied=False)) == (24, 40), "the embedding is only looked up, a bias is no matrix"
    assert count_weights(model(tied=True)) == (24, 40)
    with torch.device("meta"):
        assert count_weights(model(tied=True)) == (24, 40)


def test_device_peak():
    peak = device_peak("NVIDIA H100 80GB HBM3")
    assert (peak.datasheet, peak.measured) == (989e12, 744e12)
    assert device_peak("NVIDIA H100 PCIe").datasheet == 756e12
    assert device_peak("NVIDIA A100-SXM4-80GB").datasheet == 312e12
    assert device_peak("Radeon of 2031") is None


def row(step, **more):
    return {"step": step, "loss": 2.0, "tokens_per_s": 12345.6, "mfu": None, "peak_memory_gib": None} | more


def test_plain_lines():
    clock, out = Clock(), io.StringIO()
    with Progress(7, every=3, stream=out, clock=clock) as progress:
        for step in range(1, 8):
            clock.now += 100 if step == 1 else 2
            progress.step(row(step, mfu=0.41, peak_memory_gib=20.04))
            if step == 4:
                progress.note("saved")
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/7 (42%)", "saved", "step 6/7 (85%)", "step 7/7 (100%)"]
    assert lines[0] == "step 3/7 (42%)  loss 2.0000  12,346 tokens/s  MFU 41%  peak 20.0 GiB  0:08 left"
    assert "\r" not in out.getvalue() and "\033" not in out.getvalue()


def test_live_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    clock, out = Clock(), Terminal()
    with Progress(1000, start=10, stream=out, clock=clock) as progress:
        assert "1% " in out.getvalue() and "10/1000" in out.getvalue()
        for step in range(11, 211):
            clock.now += 0.01
            progress.step(row(step))
        assert out.getvalue().count("\r") <= 1 + 2.0 / 0.1 + 1, "at most ten redraws a second"
        progress.note("a note")
    text = out.getvalue()
    last = text.split("\r\033[K")[-1]
    assert last.startswith(" 21% ████░") and "210/1000" in last and "loss 2.0000" in last
    assert "12,346 tokens/s" in last and "0:08 left" in last and last.endswith("\n")
    assert "\r\033[Ka note\n" in text


def test_a_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(10, stream=out) as progress:
        progress.step(row(1))
    assert all(len(part.strip("\n")) < 40 for part in out.getvalue().split("\r\033[K"))


def test_disabled_and_dumb(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(2, stream=out) as progress:
        progress.step(row(1))
    assert out.getvalue() == "step 1/2 (50%)  loss 2.0000  12,346 tokens/s\n", "one step is no measure"
    quiet = io.StringIO()
    with Progress(2, stream=quiet, enabled=False) as progress:
        progress.step(row(1))
        progress.note("x")
    assert quiet.getvalue() == ""
    assert [duration(s) for s in (0, 42.4, 725, 11040)] == ["0:00", "0:42", "12:05", "3:04:00"]


def test_environment_is_json_and_says_nothing_of_the_user():
    found = environment()
    assert found["torch"] == torch.__version__ and found["packages"]["numpy"] == np.__version__
    assert "HOME" not in json.dumps(found)


def test_the_score_that_eval_metric_names_is_one_that_evaluations_give():
    """Of several sets by their names too; only files know that of a set which was given none."""

    def known(count, *names, **sections):
        held_out = tuple(Source(path="a", name=name) for name in names) or 0.1
        cfg = SimpleNamespace(eval=Eval(exact_match=count), data=SimpleNamespace(eval=held_out), **sections)
        return metrics.names(cfg)

    assert (known(0), known(3), known(0, "one")) == (["eval_loss"], ["eval_loss", "exact_match"], ["eval_loss"])
    assert known(0, "a", "b") == ["eval_loss", "eval_loss_a", "eval_loss_b"]
    streamed = SimpleNamespace(eval=200, sources=(Source(path="a", name="web"), Source(path="b")))
    of_stream = SimpleNamespace(eval=Eval(), data=streamed, stream=Stream())
    assert metrics.names(of_stream) == ["eval_loss", "eval_loss_web", "eval_loss_*"]
    assert known(0, reward=Reward()) == known(0, dpo=Dpo()) == ["eval_loss", "eval_accuracy", "eval_margin"]

    def check(metric, own=None, **more):
        sections = {"eval": Eval(metric=metric, every=1, **more), "checkpoint": Checkpoint()}
        metrics.check(SimpleNamespace(data=SimpleNamespace(eval=(Source(path="a"), Source(path="b"))), **sections), own)

    check("eval_loss"), check("eval_loss_a", patience=1), check("mine", ["mine"], patience=1)
    for wrong in ("eval_los", "exact_match", "mine"):
        with pytest.raises(UserError, match=f"an evaluation here has no '{wrong}'") as error:
            check(wrong)
        assert error.value.where == "eval.metric" and "one of eval_loss, eval_loss_*" in error.value.fix


def test_a_loss_that_is_not_plain_is_told():
    plain = SimpleNamespace(loss=Loss(), mtp=Mtp(), neftune=0)
    assert loss_note(plain) == loss_note(SimpleNamespace()) == []
    told = loss_note(SimpleNamespace(loss=Loss(name="dft", z_loss=1e-4), mtp=Mtp(depth=1), neftune=5.0))
    assert told == [
        "loss: with weights of dft, z_loss 0.0001, mtp of depth 1, neftune 5; held-out losses are plain cross-entropy"
    ]
    stored = Distill(teacher="big", divergence="js", stored=Path("kept"))
    assert loss_note(SimpleNamespace(distill=stored)) == ["teacher: big, js, by what is kept in kept"]
