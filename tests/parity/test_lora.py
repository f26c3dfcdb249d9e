"""Adapters against peft: files both ways, logits, merge, and a training curve from the same start and order."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora, merge, peft_format
from ftlib.errors import UserError
from ftlib.layers.linear import Linear

X = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=["llama-3.2-1b", "qwen2.5-7b", "qwen3-0.6b"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    config = shrunk(request.param)
    reference(config).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            for p in (factors.lora_A, factors.lora_B):
                p.normal_(0, 0.2, generator=generator)


def ours_with_adapter(folder, targets="all-linear", rank=4, alpha=12.0):
    model = models.from_pretrained(folder)
    names = lora.attach(model, targets, rank=rank, alpha=alpha)
    randomise(model)
    return model, names


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "down_proj"), r"model\.layers\.[02]\.self_attn\.(k|v)_proj"]
)
def test_peft_loads_our_adapter_with_equal_logits(folder, tmp_path, targets):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, names = ours_with_adapter(folder, targets)
    peft_format.save(model, tmp_path, base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    before = base(X).logits
    theirs = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        mine = model.logits(X)
        assert relative(mine, theirs(X).logits) <= 1e-5
    assert (mine - before).abs().max() > 0.01, "the adapter must change the logits"
    loaded = sum("lora_A" in name for name, _ in theirs.named_parameters())
    assert loaded == len(names)


def test_we_load_pefts_adapter_with_equal_logits(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "up_proj"], "init_lora_weights": False}
    theirs = get_peft_model(base, LoraConfig(**options))
    theirs.save_pretrained(tmp_path)
    model = models.from_pretrained(folder)
    peft_format.load(model, tmp_path)
    with torch.no_grad():
        assert relative(model.logits(X), theirs.eval()(X).logits) <= 1e-5


def test_off_is_the_base_to_the_bit_and_on_comes_back(folder):
    model, _ = ours_with_adapter(folder)
    plain = models.from_pretrained(folder)
    with torch.no_grad():
        on = model.logits(X)
        with lora.use(model, None):
            assert torch.equal(model.logits(X), plain.logits(X))
        assert torch.equal(model.logits(X), on)


def test_merge_is_exact_and_equals_peft(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, names = ours_with_adapter(folder)
    peft_format.save(model, tmp_path / "adapter", base=str(folder))
    with torch.no_grad():
        on = model.logits(X)
        assert merge.merge_into(model) == len(names)
        assert relative(model.logits(X), on) <= 1e-5
    models.save_pretrained(model, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        assert relative(ours(X).logits, theirs(X).logits) <= 1e-5


def test_only_adapters_train_and_a_fresh_adapter_changes_nothing(folder):
    model = models.from_pretrained(folder)
    with torch.no_grad():
        before = model.logits(X)
    lora.attach(model, "all-linear", rank=2, alpha=4)
    lora.reset(model, seed=0)
    with torch.no_grad():
        assert torch.equal(model.logits(X), before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    linears = [name for name, m in model.named_modules() if isinstance(m, Linear) and name != "lm_head"]
    assert len(trainable) == 2 * len(linears) and all("lora_" in name for name in trainable)


def test_initial_factors_depend_on_name_and_seed_alone(folder):
    def factors(targets, seed):
        model = models.from_pretrained(folder)
        lora.attach(model, targets, rank=4, alpha=8)
        lora.reset(model, seed)
        return {name: f.lora_A.detach() for name, _, f in lora.adapted(model)}

    everything, some = factors("all-linear", 0), factors(("k_proj",), 0)
    assert all(torch.equal(everything[name], value) for name, value in some.items())
    assert not torch.equal(*(next(iter(factors(("k_proj",), s).values())) for s in (0, 1)))


@pytest.mark.parametrize(
    ("targets", "words"),
    [(("q_prj",), "did you mean 'q_proj'"), ("nothing.*", "no linear layer matches"), ("(", "no regular expression")],
)
def test_targets_that_name_nothing_are_refused(folder, targets, words):
    with pytest.raises(UserError, match=words):
        lora.attach(models.from_pretrained(folder), targets, rank=2, alpha=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "IA3"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "convert it with peft"),
        # Options that we have, but that the tensors do not go with.
        ({"use_dora": True}, "has no .*lora_magnitude_vector"), ({"rank_pattern": {"q_proj": 8}}, "the model needs"),
        ({"modules_to_save": ["lm_head"]}, "which the file lacks"),
    ],
)
def test_adapters_that_cannot_be_read_right_are_refused(folder, tmp_path, change, words):
    model, _ = ours_with_adapter(folder)
    peft_format.save(model, tmp_path, base=str(folder))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words):
        peft_format.load(models.from_pretrained(folder), tmp_path)
