"""`tune plan`: the estimate as a table, from a config.json alone; what fits, and how many GPUs it takes."""

import json
import re

import pytest
from tiny_model import ROOT

from ftlib import cli
from ftlib.models import remote


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a model whose weights are not here."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text((ROOT / "tests/parity/configs/llama-3.1-8b.json").read_text())
    data = {"sources": [{"path": str(folder / "rows.jsonl")}], "seq_len": 4096}
    told = {"model": {"path": str(folder / "model")}, "data": data, "batch": {"rows": 16, "micro_rows": 2}, "steps": 1}
    (folder / "c.yaml").write_text(json.dumps(told | {"dtype": "bf16", "output_dir": str(folder / "out")}))
    return folder / "c.yaml"


def planned(capsys, *words):
    """The lines, and of each setting its cells."""
    assert cli.main(["plan", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| recompute")]
    return lines, {row[0].removesuffix(" (this config)"): row[1:] for row in rows}


def test_settings_side_by_side(config, capsys):
    """The first is what an H100 took, 54.4 GiB (tools/bench/LOG.md)."""
    lines, rows = planned(capsys, "lora_sft", "--config", config)
    assert lines[0].startswith("1 GPU of 80.0 GiB; a forward of each: 2 x 4,096 tokens")
    assert float(rows["recompute none"][5]) == pytest.approx(54.4, rel=0.02)
    assert any("recompute full (this config)" in line for line in lines)
    took = [float(row[5]) for row in rows.values()]
    assert took == sorted(took, reverse=True) and all(row[6] == "yes" for row in rows.values())
    assert all(sum(map(float, row[:5])) == pytest.approx(float(row[5]), abs=0.3) for row in rows.values())
    most = [int(row[7]) for row in rows.values()]
    assert most == sorted(most) and most[0] == 2 and most[-1] == 16  # four would take 93 GiB; the step has 16


def test_what_does_not_fit_is_told_how_many_gpus_it_takes(config, capsys):
    lines, rows = planned(capsys, "full_sft", "--config", config, "--gib=24")
    assert {row[6] for row in rows.values()} == {"no"} and {row[7] for row in rows.values()} == {"-"}
    gpus = int(re.search(r"fits on (\d+) GPUs", lines[-1])[1])
    assert "optim.in_backward and optim.offload take less" in lines[-2]
    _, rows = planned(capsys, "full_sft", "--config", config, "--gib", 24, "--gpus", gpus, "batch.micro_rows=1")
    assert rows["recompute full, offload"][6] == "yes"
    _, rows = planned(capsys, "full_sft", "--config", config, "--gib", 24, "--gpus", gpus // 2, "batch.micro_rows=1")
    assert rows["recompute full, offload"][6] == "no"
    lines, rows = planned(capsys, "full_sft", "--config", config, "--gpus", 8, "parallel.tp=2")
    assert lines[1] == "processes: 8 (dp_shard 4 x tp 2)" and float(rows["recompute full"][0]) == pytest.approx(1.9)


def test_a_model_of_the_hub_is_asked_for_all_but_its_weights(config, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        remote, "fetch", lambda name, weights=True: asked.append((name, weights)) or config.parent / "model"
    )
    planned(capsys, "lora_sft", "--config", config, "model.path=meta-llama/Llama-3.1-8B")
    assert asked == [("meta-llama/Llama-3.1-8B", False)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "the recipe comes before --config"),
        (("lora_sft", "--gpus", "none"), "--gpus needs a number of at least 1, got 'none'"),
        (("--nproc-per-node", "2", "lora_sft"), "the recipe comes before --nproc-per-node"),
        (("quantize", "--config", "demo_quantize"), "has no training step to plan"),
        (("lora_sft", "--config", "CONFIG", "--gpus=3", "parallel.tp=2"), "but there are 3 processes"),
        (("lora_sft", "--config", "CONFIG", "--gpus=3", "parallel.tp=3"), "num_attention_heads 32 is no multiple"),
        (("lora_sft", "--config", "CONFIG", "--gpus=3"), "is no multiple of batch.micro_rows 2 x 3"),
        (("pretrain", "--config", "CONFIG", "sizes.dim=65", "sizes.heads=1"), "cannot turn in pairs"),
    ],
)
def test_mistakes(config, capsys, words, told):
    assert cli.main(["plan", *(str(config) if word == "CONFIG" else word for word in words)]) == 2
    assert told in capsys.readouterr().err


def test_sizes_are_those_of_the_run(config, capsys):
    words = ("pretrain", "--config", config, "sizes.layers=4", "sizes.dim=512")
    lines, rows = planned(capsys, *words)
    assert float(rows["recompute full"][0]) < 1 and "a checkpoint 830 MiB" in lines[-1]
    assert not list((config.parent / "out").glob("shape-*"))


def test_what_just_fits_is_tight(config, capsys):
    took = float(planned(capsys, "lora_sft", "--config", config)[1]["recompute none"][5])
    assert planned(capsys, "lora_sft", "--config", config, "--gib", round(took) + 1)[1]["recompute none"][6] == "tight"


def test_a_budget_is_what_there_is(config, capsys):
    lines, rows = planned(capsys, "lora_sft", "--config", config, "memory.budget_gib=24")
    assert lines[0].startswith("1 GPU of 24.0 GiB")
    assert rows["recompute none"][6] == "no" and rows["recompute except_attention, offload"][6] == "yes"


def test_what_the_estimate_does_not_know_is_said(config, capsys):
    said = [planned(capsys, "lora_sft", "--config", config, *more)[0] for more in ((), ("qat.scheme=int4",))]
    assert ["qat is not in these estimates" in " ".join(lines) for lines in said] == [False, True]
    said = [planned(capsys, "lora_sft", "--config", config, *more)[0] for more in ((), ("memory.budget_gib=24",))]
    assert ["a run tries them on its GPU" in " ".join(lines) for lines in said] == [False, True]


def test_a_config_whose_blocks_differ_is_planned(config, capsys):
    words = "memory.recompute_layers=16", "memory.recompute_rest=selective", "memory.offload=true"
    _, rows = planned(capsys, "lora_sft", "--config", config, *words)
    between = [float(rows[name][5]) for name in rows if "in 16 blocks" in name]
    most, least = (float(rows[name][5]) for name in ("recompute selective", "recompute full, offload"))
    assert len(between) == 1 and least < between[0] < most and "recompute none" in rows
