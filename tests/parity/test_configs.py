"""Published models in their real shapes, on the meta device: parameter counts, and the configs people run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from parity.shrink import CONFIGS

from ftlib import models
from ftlib.errors import UserError
from ftlib.models import families, load

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
make_configs = importlib.import_module("make_configs")

# What the model cards and safetensors indexes say.
COUNTS = {
    "llama-3.1-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704, "gemma-2-2b": 2_614_341_888, "gemma-3-1b": 999_885_952,
    "mistral-nemo-12b": 12_247_782_400, "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760,
    "olmo-2-7b": 7_298_617_344, "gpt-oss-20b": 20_914_757_184, "smollm3-3b": 3_075_098_624,
    "seed-oss-36b": 36_151_104_512,
    "qwen1.5-moe-a2.7b": 14_315_784_192, "olmoe-1b-7b": 6_919_161_856,
    "glm-4.5-air": 106_852_251_264,  # of 110,468,824,832: without its layer for multi-token prediction
}


def built(name, folder, **changes):
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return load.build(folder, torch.bfloat16)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_published(name, tmp_path):
    model = built(name, tmp_path)
    assert sum(p.numel() for p in (*model.parameters(), *model.buffers())) == COUNTS[name]
    assert all(p.device.type == "meta" for p in model.parameters())


def test_every_kept_shape_is_read():
    for file in sorted(CONFIGS.glob("*.json")):
        assert families.read(json.loads(file.read_text()), file.name)[0].layers


@pytest.mark.parametrize("plan", make_configs.PLANS, ids=lambda plan: plan.file.stem)
def test_config_and_its_memory_estimate(plan):
    assert plan.file.read_text() == make_configs.text(plan), "run python tools/make_configs.py"


def test_every_family_has_a_config():
    shapes = [json.loads((CONFIGS / f"{plan.shape}.json").read_text()) for plan in make_configs.PLANS]
    assert {config.get("text_config", config)["model_type"] for config in shapes} == set(families.FAMILIES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "'lama' is not supported (did you mean 'llama'?)"),
        ({"hidden_act": "relu9"}, "activation 'relu9'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "wobble": 1}}, "no setting 'wobble'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs 'low_freq_factor'"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not supported for model_type 'llama'"),
        ({"partial_rotary_factor": 0.5, "qkv_bias": True}, "qkv_bias=True"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_changes_the_maths_is_refused(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        built("llama-3.1-8b", tmp_path, **change)
    assert words in str(error.value) and "config.json" in str(error.value)
    if "did you mean" in words or "type 'dynamic'" in words or "relu9" in words:
        assert "supported: " in str(error.value)
    if "model_type" in change:
        assert "model.code" in str(error.value) and "tools/new_family.py" in str(error.value)


@pytest.mark.parametrize("name", ["gemma-3-4b", "ministral-3-3b"])
def test_a_vision_models_language_part_trains_and_the_rest_is_kept(name, tmp_path):
    from parity.shrink import reference, relative, shrunk
    from safetensors.torch import load_file, save_file

    inner = shrunk(name)
    theirs = reference(inner)
    stored = {f"language_model.{key}": p.detach().contiguous() for key, p in theirs.named_parameters()}
    stored |= {"vision_tower.patch.weight": torch.ones(3), "multi_modal_projector.norm.weight": torch.ones(2)}
    save_file(stored, tmp_path / "model.safetensors")
    whole = json.loads((CONFIGS / f"{name}.json").read_text()) | {"text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    ours = models.from_pretrained(tmp_path)
    x = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours.logits(x), theirs(x).logits) <= 1e-5
    models.save_pretrained(ours, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


def test_an_unread_flag_of_a_family_that_knows_it_is_fine():
    config = json.loads((CONFIGS / "granite-3.3-8b.json").read_text())
    assert families.read(config)[0].logit_scale == 1 / 16
