"""recipes/quantize.py after training with `qat`: the result scores what training said it would; resuming; refusals."""

import json
import shutil

import pytest
import torch
from parity.shrink import relative

from ftlib import models, quant
from ftlib.cli import main as tune
from ftlib.models.load import DTYPES
from ftlib.quant.schemes import SCHEMES

DATA = ["eval.exact_match=0", "data.eval=8", "batch.rows=2", "batch.micro_rows=2", "data.seq_len=128"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quantize(model, folder, *more):
    run = ["run", "recipes/quantize.py", "--config", "configs/demo_quantize.yaml", *DATA, "batch.rows=8"]
    assert tune([*run, f"model.path={model}", f"output_dir={folder}", *more]) == 0
    return rows(folder)


@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [
        ("full", "int4"), ("lora", "int8_int4"), pytest.param("full", "fp8", marks=pytest.mark.slow),
        pytest.param("lora", "int4", marks=pytest.mark.slow), pytest.param("lora", "fp8", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_training_resuming_and_converting_agree(recipe, scheme, tmp_path, capsys, monkeypatch):
    steps, at = [], quant.at
    monkeypatch.setattr(quant, "at", lambda step, model: (steps.append(step), at(step, model)))
    run = ["run", f"recipes/{recipe}_sft.py", "--config", f"configs/demo_{recipe}.yaml", *DATA, "steps=4"]
    dtype = "bf16" if recipe == "lora" else "fp32"  # merging keeps the precision the base is stored in
    run += [
        f"dtype={dtype}",
        "checkpoint.every=2",
        f"qat.scheme={scheme}",
        "qat.group=16",
        "qat.after=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert tune(run) == 0
    assert f"rounding: 28 layers of 28 to {scheme}, after step 1" in capsys.readouterr().out
    found = rows(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_000004")
    shutil.rmtree(tmp_path / "run/final")
    assert tune(run) == 0
    assert steps == [1, 2, 3, 4, 3, 4], "each is told before it is taken"
    drop = ("tokens_per_s", "data_wait")
    again = rows(tmp_path / "run")
    kept = [[{k: v for k, v in row.items() if k not in drop} for row in each] for each in (found, again)]
    assert kept[0] == kept[1]
    model = tmp_path / "run/final"
    if recipe == "lora":
        assert tune(["merge", "ftlib:demo/model", str(model), str(tmp_path / "merged")]) == 0
        model = tmp_path / "merged"
    before, after = quantize(model, tmp_path / "quantized", f"to.scheme={scheme}", "to.group=16", f"dtype={dtype}")
    assert after["eval_loss"] == pytest.approx(found[-1]["eval_loss"], rel=1e-6)
    assert before["eval_loss"] != after["eval_loss"]
    final = models.from_pretrained(tmp_path / "quantized/final", dtype=torch.float32)
    plain = models.from_pretrained(model, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj"
    written, weight = (each.get_submodule(name).weight.detach() for each in (final, plain))
    weight = weight.to(DTYPES[dtype])
    assert relative(written, SCHEMES[scheme].weight(weight, 16)) < 0.01 < relative(written, weight)
    size = (tmp_path / "quantized/final/model.safetensors").stat().st_size
    assert size < (model / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("recipe", "more", "says"),
    [
        ("lora_sft", ["qat.scheme=int4", "model.quantize=nf4"], "not in a second way"),
        ("lora_sft", ["qat.scheme=int4", "lora.dora=true"], "no gradient for a length"),
        ("lora_sft", ["qat.scheme=int4", "lora.modules_to_save=[up_proj]"], "up_proj: a module trained whole"),
        ("full_sft", ["qat.scheme=int4", "parallel.tp=2"], "rounded whole"),
        ("full_sft", ["qat.scheme=int4", "qat.after=45"], "begin after the last of 45"),
        ("full_sft", ["qat.scheme=int4", "qat.group=40"], "no multiple of 40"),
        ("full_sft", ["qat.group=12"], "multiple of 8"),
        ("quantize", ["to.scheme=int3"], "expected one of 'int4'"),
    ],
)
def test_refused(recipe, more, says, tmp_path, capsys):
    config = f"configs/demo_{recipe.removesuffix('_sft')}.yaml"
    assert tune(["validate", f"recipes/{recipe}.py", "--config", config, *more, f"output_dir={tmp_path}"]) == 2
    assert says in capsys.readouterr().err


def test_changing_it_between_runs_is_refused(tmp_path, capsys):
    run = ["run", "recipes/full_sft.py", "--config", "configs/demo_full.yaml", *DATA, f"output_dir={tmp_path}"]
    assert tune([*run, "steps=1", "qat.scheme=fp8"]) == 0
    assert tune([*run, "steps=2"]) == 2
    assert "qat" in capsys.readouterr().err
