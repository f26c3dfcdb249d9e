"""Every kind of adapter against peft: its start, its gradients, its files in both directions, its merge."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora, merge, peft_format, saved_modules
from ftlib.errors import UserError

X = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"layers.0.*proj": 3.0}}
KINDS = {
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "patterns": (PATTERNS, PATTERNS),
    "patterns-rslora-dora": (
        {"rslora": True, "dora": True, **PATTERNS}, {"use_rslora": True, "use_dora": True, **PATTERNS},
    ),
    "saved": ({"modules_to_save": ("lm_head", "embed_tokens", "model.norm")},
              {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"]}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "pissa-rslora-patterns": (
        {"init": "pissa", "rslora": True, **PATTERNS},
        {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
    ),
    "pissa-dora": ({"init": "pissa", "dora": True}, {"init_lora_weights": "pissa", "use_dora": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tied head; biases on q, k, v."""
    found = {}
    for kind, name in {"tied": "llama-3.2-1b", "biased": "qwen2.5-7b"}.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        config = shrunk(name)
        reference(config).save_pretrained(found[kind])
        (found[kind] / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def folder(folders):
    return folders["biased"]


def ours(folder, options, seed=0):
    model = models.from_pretrained(folder)
    lora.attach(model, "all-linear", rank=4, alpha=12.0, **options)
    lora.reset(model, seed)
    return model


def base_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def theirs(folder, options):
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 12.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    return get_peft_model(base_of(folder), LoraConfig(**options))


def train(parameters, logits, steps=2):
    """A few plain steps that every trainable tensor takes part in; the last logits."""
    parameters = [p for p in parameters if p.requires_grad]
    for _ in range(steps):
        (logits().log_softmax(-1)[..., 7]).mean().backward()
        with torch.no_grad():
            for p in parameters:
                p -= 0.3 * p.grad
                p.grad = None
    with torch.no_grad():
        return logits()


def start_alike(mine, other):
    """Give peft's trainable tensors our values (random ones of B too), except those that follow from the base."""
    mapped = {}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, _, factors in lora.adapted(mine):
            if factors.start_A is None:
                factors.lora_B.normal_(0, 0.1, generator=generator)
            layer = other.base_model.model.get_submodule(name)
            mapped |= {layer.lora_A["default"].weight: factors.lora_A, layer.lora_B["default"].weight: factors.lora_B}
        for p, value in mapped.items():
            p.copy_(value)


@pytest.mark.parametrize(("base", "kind"), [("tied", "saved"), *(("biased", kind) for kind in KINDS)])
def test_start_training_and_files_both_ways_equal_peft(folders, tmp_path, base, kind):
    """From the same start, a few steps of both; then peft loads ours, we load peft's, and merged weights agree."""
    from peft import PeftModel

    options, their_options = KINDS[kind]
    folder = folders[base]
    mine, other = ours(folder, options), theirs(folder, their_options)
    with torch.no_grad():
        plain = models.from_pretrained(folder).logits(X)
        assert relative(mine.logits(X), plain) <= 1e-5, "a fresh adapter changes nothing"
        assert relative(other(X).logits, plain) <= 1e-4
    start_alike(mine, other)
    after = train(mine.parameters(), lambda: mine.logits(X))
    expected = train(other.parameters(), lambda: other(X).logits)
    assert relative(after, plain) > 0.01, "training must have moved the logits"
    assert relative(after, expected) <= 1e-4
    with lora.use(mine, None), torch.no_grad():
        assert torch.equal(mine.logits(X), plain), "off is the base, to the bit"

    peft_format.save(mine, tmp_path / "ours", base=str(folder))
    other.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base_of(folder), tmp_path / "ours")
        assert relative(loaded.eval()(X).logits, after) <= 1e-5, "peft loads ours onto the original base"
        for made_by in ("ours", "theirs"):
            again = models.from_pretrained(folder)
            peft_format.load(again, tmp_path / made_by)
            assert relative(again.logits(X), after) <= 1e-4, f"we load {made_by}"
            assert not any(p.requires_grad for p in again.parameters())
        merged = loaded.merge_and_unload()
        assert merge.merge_into(mine) == len(list(lora.targets.find(mine, "all-linear"))) + 3 * (kind == "saved")
        assert relative(mine.logits(X), after) <= 3e-5
        models.save_pretrained(mine, tmp_path / "merged")
        written = base_of(tmp_path / "merged")
        assert relative(written(X).logits, after) <= 3e-5
        if kind != "saved":  # where the base ties them, peft writes a trained head into the embedding as well
            assert relative(written(X).logits, merged(X).logits) <= 3e-5


def test_the_starts_are_pefts(folder):
    """What follows from W alone must equal; A of pissa and olora up to the sign of each direction."""
    for kind in ("pissa", "olora", "pissa-rslora-patterns"):
        mine, other = ours(folder, KINDS[kind][0]), theirs(folder, KINDS[kind][1])
        for name, _, factors in lora.adapted(mine):
            layer = other.base_model.model.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert factors.scale == pytest.approx(layer.scaling["default"])
            assert relative(factors.lora_B @ factors.lora_A, b @ a) <= 1e-4
    gaussian = ours(folder, {"init": "gaussian"})
    spread = torch.cat([f.lora_A.flatten() * f.rank for _, _, f in lora.adapted(gaussian)])
    assert abs(spread.std() - 1) < 0.05 and abs(spread.mean()) < 0.05
    assert all(not f.lora_B.any() for _, _, f in lora.adapted(gaussian))


def test_dropout_in_dora_equals_peft(folder):
    """peft applies W to the input with holes too; both draw their holes from torch's generator in layer order."""
    mine = ours(folder, {"dora": True, "dropout": 0.3}).train()
    other = theirs(folder, {"use_dora": True, "lora_dropout": 0.3}).train()
    start_alike(mine, other)
    name, linear, factors = next(lora.adapted(mine))
    x = torch.randn(5, linear.in_features)
    layer = other.base_model.model.get_submodule(name)
    with torch.no_grad():
        factors.magnitude.mul_(1.3)
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
        torch.manual_seed(1)
        a = linear(x)
        torch.manual_seed(1)
        assert relative(a, layer(x)) <= 1e-5


def test_lora_plus_trains_b_as_peft_does(folder):
    from peft.optimizers import create_loraplus_optimizer

    from ftlib import optim
    from ftlib.sections import Optim

    mine, other = ours(folder, {"lr_ratio": 8.0, "dora": True}), theirs(folder, {"use_dora": True})
    optimizer = optim.build(mine, Optim(lr=1e-3, betas=(0.9, 0.999)))
    reference = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, eps=1e-8, betas=(0.9, 0.999)
    )
    start_alike(mine, other)
    for _ in range(3):
        mine.logits(X).log_softmax(-1)[..., 7].mean().backward()
        other(X).logits.log_softmax(-1)[..., 7].mean().backward()
        optim.step(optimizer, None)
        reference.step(), reference.zero_grad()
    with torch.no_grad():
        assert relative(mine.logits(X), other(X).logits) <= 1e-4
    rates = {g["lr"] for g in optimizer.param_groups}
    assert rates == {1e-3, 8e-3}


def test_two_adapters_with_their_own_modules_and_one_active(folder, tmp_path):
    mine = ours(folder, {"modules_to_save": ("lm_head",)})
    start = mine.logits(X)
    train(mine.parameters(), lambda: mine.logits(X))
    peft_format.save(mine, tmp_path, base=str(folder))
    two = models.from_pretrained(folder)
    peft_format.load(two, tmp_path, name="ref")
    peft_format.load(two, tmp_path, name="policy", trainable=True)
    with torch.no_grad():
        assert torch.equal(two.logits(X), mine.logits(X))
    train(two.parameters(), lambda: two.logits(X))
    with torch.no_grad():
        assert relative(two.logits(X), mine.logits(X)) > 1e-3
        with lora.use(two, "ref"):
            assert torch.equal(two.logits(X), mine.logits(X)), "the reference stays what it was"
        with lora.use(two, None):
            assert relative(two.logits(X), start) <= 1e-5


def test_a_saved_module_of_a_bf16_base_trains_in_float32(folder):
    model = models.from_pretrained(folder, dtype=torch.bfloat16)
    lora.attach(model, ("q_proj",), rank=2, alpha=4, modules_to_save=("lm_head", "norm"))
    lora.reset(model, 0)
    assert {hf for hf, _, _ in saved_modules.saved(model, "policy")} == {"lm_head", "model.norm"}
    model.logits(X).float().square().mean().backward()
    copies = [p for _, _, c in saved_modules.saved(model, "policy") for p in c.parameters()]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in copies)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head._parameters["weight"].grad is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ("lm_haed",)}, "did you mean 'lm_head'"),
        ({"modules_to_save": ("q_proj",)}, "low-rank factors too"),
        ({"rank_pattern": {"q_prj": 3}}, "no adapted layer"),
        ({"init": "pissa", "rank_pattern": {"q_proj": 4000}}, "main directions"),
    ],
)
def test_options_that_fit_nothing_are_refused(folder, options, words):
    with pytest.raises(UserError, match=words):
        lora.attach(models.from_pretrained(folder), "all-linear", rank=4, alpha=12.0, **options)
