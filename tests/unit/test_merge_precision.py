"""`tune merge` stores what it merges in the precision of the files it read, whatever config.json says of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_model

from ftlib import cli, models
from ftlib.adapters import lora, peft_format


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a model in float32 whose config.json says bfloat16, an adapter for it that changes nothing)."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model", torch_dtype="bfloat16", dtype=None)
    model = models.from_pretrained(folder / "model")
    lora.attach(model, "all-linear", rank=2, alpha=2.0)
    lora.reset(model, 0)
    peft_format.save(model, folder / "adapter", base=str(folder / "model"))
    return folder / "model", folder / "adapter"


def test_float32_files_stay_float32(base, tmp_path, capsys):
    model, adapter = base
    assert json.loads((model / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert cli.main(["merge", str(model), str(adapter), str(tmp_path / "out")]) == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert all(found[key].dtype == torch.float32 and found[key].equal(wanted[key]) for key in wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "rounded" not in capsys.readouterr().err


def test_a_few_numbers_that_are_rounded_are_told(base, tmp_path, capsys):
    model, adapter = base
    tensors = {key: t if "norm" in key else t.bfloat16() for key, t in load_file(model / "model.safetensors").items()}
    few = sum(t.numel() for key, t in tensors.items() if "norm" in key)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in model.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["merge", str(mixed), str(adapter), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert f"note: {few:,} numbers of {mixed} are float32 and are rounded to bfloat16" in capsys.readouterr().err
