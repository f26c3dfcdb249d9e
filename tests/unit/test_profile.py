"""The profile of a run: a trace that opens, a table that adds up, and the same training as without it."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from ftlib.cli import main as tune
from ftlib.layers.linear import Linear
from ftlib.observe.profile import REST, component, memory
from ftlib.quant import QuantizedLinear

OPTIONS = ["steps=8", "eval.exact_match=0", "data.eval=2", "batch.rows=2", "batch.micro_rows=2", "data.seq_len=128"]


def train(folder: Path, *more: str) -> list[dict]:
    recipe = ["recipes/lora_sft.py", "--config", "configs/demo_lora.yaml", f"output_dir={folder}"]
    assert tune(["run", *recipe, *OPTIONS, *more]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_profiled_run(tmp_path, capsys):
    plain, profiled = train(tmp_path / "a"), train(tmp_path / "b", "profile=true")
    assert [row.get("loss") for row in plain] == [row.get("loss") for row in profiled]
    assert "a step takes" in capsys.readouterr().out
    found = json.loads((tmp_path / "b/profile/summary.json").read_text())
    times = found["time_ms"]
    assert {"matrix products", "attention", "head and loss", "optimizer", "embedding", REST} <= set(times)
    assert times["matrix products"]["backward"] > 0 and times["optimizer"]["backward"] == 0
    assert 0.3 * found["step_ms"] < sum(sum(part.values()) for part in times.values()) <= found["step_ms"]
    held = found["memory_gib"]
    assert held["frozen weights"] > held["trained weights"] > 0 and held["optimizer state"] >= held["gradients"] > 0
    trace = json.loads(gzip.decompress((tmp_path / "b/profile/trace.json.gz").read_bytes()))
    assert len(trace["traceEvents"]) > 1000
    assert not (tmp_path / "a/profile").exists()


def test_a_start_with_too_few_steps_is_told(tmp_path, capsys):
    """Before the run where its steps are too few, behind it where those that are left are."""
    words = ["recipes/lora_sft.py", "--config", "configs/demo_lora.yaml", *OPTIONS, "profile=true"]
    assert tune(["validate", *words, "steps=5"]) == 2
    assert "steps 4 to 6 are traced, and the run has 5" in capsys.readouterr().err
    train(tmp_path, "steps=4")
    train(tmp_path, "profile=true")
    assert "3 steps behind a start's first 3 are traced, and this one took 4" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists() and "resume: auto" in (tmp_path / "config.yaml").read_text()
    train(tmp_path, "checkpoint.resume=never")
    assert "resume: auto" in (tmp_path / "config.yaml").read_text(), "the proposed command goes on"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::mm", "_LinearCrossEntropy"], "head and loss"),
        (["aten::addmm", "aten::linear", "nvjet_sm90_tst_192x192"], "matrix products"),
        (["aten::_cudnn_attention_backward", "autograd::engine::evaluate_function"], "attention"),
        (["cuLaunchKernel", "ncclDevKernel_AllGather_RING_LL"], "communication"),
        (["aten::mul_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["triton_poi_fused_mul_silu_5"], REST),
    ],
)
def test_component(names, expected):
    assert component(names) == expected


def test_quantized_weights_are_counted_in_their_bits():
    layer = QuantizedLinear(Linear(512, 512, bias=False), "nf4")
    held = memory(layer, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), None)
    assert held["frozen weights"] == pytest.approx(layer.base.nbytes / 2**30, abs=1e-6) and held["trained weights"] == 0
