"""Adapters where transformers fuses what we split, or stacks experts: files both ways with peft, merge, training."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora, merge, peft_format, setup
from ftlib.errors import UserError
from ftlib.models import load
from ftlib.sections import Lora

X = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))
CASES = [
    ("phi-4-mini", "all-linear"), ("phi-4-mini", ("v_proj", "gate_proj", "o_proj")), ("glm-4-9b", "all-linear"),
    ("mixtral-8x7b", "all-linear"), ("qwen3-30b-a3b", "all-linear"), ("qwen3-30b-a3b", ("experts.down_proj",)),
    ("gpt-oss-20b", "all-linear"), ("gpt-oss-20b", ("gate_up_proj", "q_proj")), ("gemma-3-1b", "all-linear"),
    ("qwen3-30b-a3b mixed", "all-linear"), ("qwen3-30b-a3b mixed", ("gate_proj", "down_proj")),
    ("glm-4.5-air", "all-linear"), ("glm-4.5-air", ("up_proj", "experts.gate_up_proj")),
    ("qwen1.5-moe-a2.7b", "all-linear"), ("qwen1.5-moe-a2.7b", ("shared_expert.down_proj",)),
    ("olmoe-1b-7b", "all-linear"),
]
MIXED = {"mlp_only_layers": [1]}  # a dense layer among those with experts
OPTIONS = {
    "qwen3-30b-a3b mixed": {"rank_pattern": {r"layers\.1\.mlp\.gate_proj": 5}, "alpha_pattern": {"down_proj": 2.0}},
    "mixtral-8x7b": {"rank_pattern": {r"experts\.down_proj": 2, "o_proj": 4}},
}


def base(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs.set_experts_implementation("eager")
    return theirs


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1] if case[1][0] == 'a' else 'some'}")
def adapted(request, tmp_path_factory):
    """(model with a random adapter, folder of its base)."""
    name, targets = request.param
    folder = tmp_path_factory.mktemp("base")
    config = shrunk(name.split()[0], **(MIXED if "mixed" in name else {}))
    reference(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    model = models.from_pretrained(folder)
    lora.attach(model, targets, rank=3, alpha=7.0, **OPTIONS.get(name, {}))
    lora.reset(model, 0)
    with torch.no_grad():
        plain = model.logits(X)
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return model, folder, plain


def test_a_fresh_adapter_changes_nothing_and_off_is_the_base(adapted):
    model, folder, plain = adapted
    with torch.no_grad():
        assert torch.equal(plain, models.from_pretrained(folder).logits(X))
        with lora.use(model, None):
            assert torch.equal(model.logits(X), plain)
        assert (model.logits(X) - plain).abs().max() > 0.01


def test_peft_loads_it_and_what_it_saves_comes_back(adapted, tmp_path):
    from peft import PeftModel

    model, folder, _ = adapted
    peft_format.save(model, tmp_path / "ours", base=str(folder))
    theirs = PeftModel.from_pretrained(base(folder), tmp_path / "ours")
    with torch.no_grad():
        mine = model.logits(X)
        assert relative(mine, theirs(X).logits) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = models.from_pretrained(folder)
    peft_format.load(again, tmp_path / "theirs")
    with torch.no_grad():
        assert relative(again.logits(X), mine) <= 1e-5


def test_merged_equals_adapted(adapted, tmp_path):
    model, folder, _ = adapted
    peft_format.save(model, tmp_path, base=str(folder))
    again = models.from_pretrained(folder)
    peft_format.load(again, tmp_path)
    merge.merge_into(again)
    models.save_pretrained(again, tmp_path / "merged")
    with torch.no_grad():
        assert relative(again.logits(X), model.logits(X)) <= 1e-5
        assert relative(base(tmp_path / "merged")(X).logits, model.logits(X)) <= 1e-5


def test_gradients_of_experts_equal_pefts(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = shrunk("qwen3-30b-a3b")
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": parameters}
    theirs = get_peft_model(base(tmp_path), LoraConfig(**options, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter")
    model = models.from_pretrained(tmp_path)
    peft_format.load(model, tmp_path / "adapter", trainable=True)
    theirs(X).logits.square().mean().backward()
    model.logits(X).square().mean().backward()
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for layer, _, factors in lora.adapted(model):
        where = layer.rpartition(".")[0] + (".base_layer" if layer.endswith("gate_up_proj") else "")
        for part in ("lora_A", "lora_B"):
            theirs_grad = expected[f"base_model.model.{where}.{part}.weight"]
            assert relative(getattr(factors, part).grad, theirs_grad) <= 1e-5, layer


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}, {"init": "pissa"}])
def test_what_experts_cannot_have_is_refused(tmp_path, options):
    config = shrunk("qwen3-30b-a3b")
    reference(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"lora.{next(iter(options))} does not work on stacked experts"):
        lora.attach(models.from_pretrained(tmp_path), "all-linear", rank=2, alpha=4, **options)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dora": True}])
def test_what_peft_cannot_hold_beside_experts_is_refused(tmp_path, options):
    config = shrunk("qwen3-30b-a3b", **MIXED)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load.build(tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"on model.layers.1.mlp.gate_proj: peft knows no such adapter"):
        setup.attach(model, Lora(targets=("gate_proj",), **options))
    setup.attach(load.build(tmp_path, torch.float32), Lora(targets=("q_proj",), **options))
