"""Adapters and frozen parts in whole runs: what trains, what is continued, what a resumed run finds again."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import losses, probe, train, tune, write_config, write_model, write_rows

from ftlib import models
from ftlib.adapters import freeze, lora, peft_format
from ftlib.adapters import setup as adapters
from ftlib.adapters.fuse import fuse
from ftlib.errors import UserError
from ftlib.observe import count_weights
from ftlib.sections import Lora, Train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", 64)


def config(base, folder, **sections):
    folder.mkdir(exist_ok=True)
    return write_config(folder / "config.yaml", *base, **({"steps": 6, "checkpoint": {"every": 3}} | sections))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_kind_of_adapter_at_once_resumes_as_if_never_stopped(base, tmp_path):
    kinds = {"dora": True, "init": "pissa", "rslora": True, "modules_to_save": ["lm_head"], "lr_ratio": 4.0,
             "rank_pattern": {"q_proj": 2}, "dropout": 0.1}  # fmt: skip
    whole = train("lora_sft", "--config", config(base, tmp_path / "whole", lora=kinds))
    file = config(base, tmp_path / "parts", lora=kinds, schedule={"name": "constant", "warmup_steps": 0})
    reference = train("lora_sft", "--config", file, f"output_dir={tmp_path}/once")
    train("lora_sft", "--config", file, "steps=3")
    assert losses(train("lora_sft", "--config", file))[3:] == losses(reference)[3:]
    assert whole[-1]["loss"] < whole[0]["loss"]
    once, parts = (load_file(tmp_path / f / "final" / peft_format.TENSORS) for f in ("once", "parts/out"))
    assert once.keys() == parts.keys() and all(torch.equal(parts[key], value) for key, value in once.items())


def test_a_run_continues_an_adapter_and_refuses_another_shape(base, tmp_path):
    first = config(base, tmp_path / "first", lora={"rank": 4, "dora": True, "modules_to_save": ["norm"]})
    train("lora_sft", "--config", first)
    start = tmp_path / "first" / "out" / "final"
    second = config(base, tmp_path / "second", lora={"start_from": str(start)}, steps=1, optim={"lr": 1e-30})
    train("lora_sft", "--config", second)
    one, two = (load_file(folder / peft_format.TENSORS) for folder in (start, tmp_path / "second" / "out" / "final"))
    assert one.keys() == two.keys() and all(torch.equal(two[key], value) for key, value in one.items())
    with pytest.raises(UserError, match=r"lora\.rank: 8 here, 4 in the adapter"):
        train("lora_sft", "--config", second, "lora.rank=8", "checkpoint.resume=never")


def test_a_preference_run_holds_the_adapter_it_started_from(base, tmp_path):
    model = models.from_pretrained(base[0])
    lora.attach(model, ("q_proj", "up_proj"), rank=2, alpha=4, dropout=0.2, modules_to_save=("lm_head",))
    lora.reset(model, 0)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.2)
        model.lm_head.adapters["policy"].weight.mul_(1.1)
    peft_format.save(model, tmp_path, base=str(base[0]))
    start = probe(model.eval().logits)
    cfg = Lora(start_from=str(tmp_path), dropout=0.1)
    chained = models.from_pretrained(base[0]).train()
    adapters.attach(chained, cfg, reference=True)
    adapters.fill(chained, cfg, seed=0)
    assert trained(chained) and all(".policy." in name for name in trained(chained))
    chained.logits(torch.tensor([[5, 6, 7]])).square().mean().backward()
    with torch.no_grad():
        for p in chained.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    with lora.use(chained, adapters.reference_name(cfg)):
        assert torch.equal(probe(chained.logits), start), "no dropout, no change: the reference"
    assert not torch.equal(probe(chained.eval().logits), start)
    assert adapters.reference_name(Lora()) is None


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (Train(only=("lm_head",)), {"model.embed_tokens.weight"}),  # tied: one parameter, under its first name
        (Train(only=(r"layers\.2\.",), freeze=("proj",)),
         {"model.layers.2.attn_pre.weight", "model.layers.2.mlp_pre.weight"}),
    ],
)  # fmt: skip
def test_parts_of_a_model_train(base, section, names):
    model = models.from_pretrained(base[0])
    assert freeze.apply(model, section) == len(names) and trained(model) == names


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (Train(freeze=("lm_haed",)), "no parameter's name contains 'lm_haed'"),
        (Train(only=("(",)), "no regular expression"),
        (Train(freeze=(".",)), "every parameter is frozen"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(base, section, words):
    with pytest.raises(UserError, match=words):
        freeze.apply(models.from_pretrained(base[0]), section)


def test_full_sft_leaves_frozen_weights_as_they_were_and_resumes(base, tmp_path):
    part = {"only": [r"layers\.[12]\."], "freeze": ["mlp"]}
    rows = train("full_sft", "--config", config(base, tmp_path, train=part))
    before, after = load_file(base[0] / "model.safetensors"), load_file(tmp_path / "out/final/model.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {key for key in before if ("layers.1." in key or "layers.2." in key) and ".mlp." not in key}
    with safe_open(next((tmp_path / "out/checkpoints/step_000006").glob("*.safetensors")), "pt") as saved:
        assert sum(key.startswith("model.") for key in saved.keys()) == len(changed), "frozen ones are not saved"  # noqa: SIM118
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(UserError, match=r"train\.freeze"):
        train("full_sft", "--config", tmp_path / "config.yaml", "train.freeze=[]", "steps=9")


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "olora"}, {"dropout": 0.1}])
def test_only_plain_adapters_are_fused(base, options):
    for fused, more in ((0, options), (12, {"rslora": True})):
        model = models.from_pretrained(base[0])
        lora.attach(model, "all-linear", rank=2, alpha=4, **more)
        lora.reset(model, 0)
        assert fuse(model) == fused


def test_sections_refuse_what_cannot_be():
    for wrong in ({"rank": 0}, {"rank_pattern": {"q_proj": 0}}, {"dropout": 1.0}, {"lr_ratio": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lora(**wrong)


@pytest.mark.slow
def test_two_processes_give_the_adapter_of_one(base, tmp_path):
    """Factors, magnitudes and whole modules sharded; a start inside W is found from all of W.

    Last result (2026-11-23): passed."""
    kinds = {"dora": True, "init": "pissa", "modules_to_save": ["lm_head", "norm"], "lr_ratio": 2.0}
    found = {}
    for world in (1, 2):
        file = config(base, tmp_path / str(world), lora=kinds, batch={"rows": 4, "micro_rows": 2}, steps=3)
        if world == 1:
            train("lora_sft", "--config", file)
        else:
            assert tune("run", "--nproc-per-node", world, "recipes/lora_sft.py", "--config", file)[0] == 0
        found[world] = load_file(tmp_path / str(world) / "out" / "final" / peft_format.TENSORS)
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert (found[2][key] - value).abs().max() <= 1e-4 * value.abs().max().clamp_min(1e-2), key


def test_work_counts_the_copy_of_a_module_that_is_trained_whole(base):
    model = models.from_pretrained(base[0])
    plain = sum(count_weights(model))
    lora.attach(model, ("q_proj",), rank=2, alpha=4, modules_to_save=("lm_head", "embed_tokens"))
    factors = sum(f.lora_A.numel() + f.lora_B.numel() for _, _, f in lora.adapted(model))
    head = model.lm_head.weight.numel()
    assert count_weights(model) == (plain - head, factors + head)
