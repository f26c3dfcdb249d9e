"""recipes/quantize.py after training with `qat`: the result scores what training said it would; refusals."""

import json

import pytest
import torch
from parity.shrink import relative
from safetensors.torch import load_file, save_file
from tiny_model import train, write_config, write_model, write_rows

from ftlib import models
from ftlib.cli import loading
from ftlib.cli import main as tune
from ftlib.models.load import DTYPES
from ftlib.quant.schemes import SCHEMES


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A config of a model that is stored in bf16: merging keeps the precision that the base is stored in."""
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder / "model", num_hidden_layers=2)
    weights = {name: weight.bfloat16() for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors")
    rows, held_out = write_rows(folder / "rows.jsonl", 40), write_rows(folder / "held_out.jsonl", 4, seed=1)
    return write_config(folder / "config.json", model, rows, held_out)


@pytest.mark.parametrize("recipe", ["full", "lora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_and_converting_agree(recipe, scheme, file, tmp_path, capsys):
    dtype = {"full": "fp32", "lora": "bf16"}[recipe]
    rounding = {"scheme": scheme} | ({"group": 16} if SCHEMES[scheme].grouped else {})
    settings = json.loads(file.read_text()) | {"dtype": dtype, "qat": rounding | {"after": 1}}
    settings |= {"steps": 4, "output_dir": str(tmp_path / "run")}
    (tmp_path / "train.json").write_text(json.dumps(settings))
    trained = train(f"{recipe}_sft", "--config", tmp_path / "train.json")
    base, model = settings["model"]["path"], tmp_path / "run/final"
    if recipe == "lora":
        assert tune(["merge", base, str(model), str(tmp_path / "merged")]) == 0
        model = tmp_path / "merged"
    settings = {key: settings[key] for key in ("data", "batch", "dtype")} | {"to": rounding}
    settings |= {"model": {"path": str(model)}, "output_dir": str(tmp_path / "quantized")}
    (tmp_path / "quantize.json").write_text(json.dumps(settings))
    before, after = train("quantize", "--config", tmp_path / "quantize.json")
    assert before["eval_loss"] != after["eval_loss"] == trained[-1]["eval_loss"]
    capsys.readouterr()
    final, _ = loading.load(tmp_path / "quantized/final", None, dtype=torch.float32, device="cpu")
    assert ("only its weights are rounded" in capsys.readouterr().err) == (scheme != "int4"), "inputs are not, here"
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
        ("full_sft", ["qat.scheme=int4", "parallel.tp=2"], "rounds whole matrices"),
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


@pytest.mark.parametrize(("form", "slow"), [("int8", True), ("nf4", False)])
def test_a_start_from_little_loss_is_warned_of(form, slow, tmp_path, recwarn):
    words = ["--config", "configs/demo_lora.yaml", f"model.quantize={form}", "lora.init=loftq"]
    assert tune(["validate", "recipes/lora_sft.py", *words, f"output_dir={tmp_path}"]) == 0
    assert any("learn slowly at first" in str(one.message) for one in recwarn) == slow
