"""Tokens that a model has never seen, from a config to what transformers and peft load."""

import json

import pytest
import torch
from tiny_model import ROOT, losses, steps, train, tune, write_config, write_model

from ftlib import models, tokenizers
from ftlib.adapters import merge, peft_format
from ftlib.errors import UserError

NEW = ("<red>", "<blue>")


def prepare(folder, tied=True, **sections):
    """A model and rows whose answers are new tokens; returns the config's path."""
    folder.mkdir()
    model = write_model(folder, tie_word_embeddings=tied)
    rows = [
        {"messages": [{"role": "user", "content": f"say {name}"}, {"role": "assistant", "content": f"<{name}>"}]}
        for name in ("red", "blue") * 10
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"tokenizer": {"add_tokens": list(NEW)}, "steps": 4, **sections}
    return write_config(folder / "config.yaml", model, folder / "rows.jsonl", **sections)


def weights(folder):
    return models.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_alone_and_peft_loads_them(tmp_path, tied):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    config = prepare(tmp_path / "m", tied)
    rows = train("lora_sft", "--config", config)
    assert rows[-1]["loss"] < rows[0]["loss"]
    final = tmp_path / "m" / "out" / "final"

    tokenizer, theirs = tokenizers.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer.encode("say <red><|im_end|><blue>")
    assert ids == theirs.encode("say <red><|im_end|><blue>") and {ids[-1], ids[-3]} == {259, 260}

    model = models.from_pretrained(tmp_path / "m", dtype=torch.float32)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    peft_format.load(model, final)
    model.eval()
    logits = model.logits(torch.tensor([ids])).detach()
    peft_model = AutoPeftModelForCausalLM.from_pretrained(final).eval()
    torch.testing.assert_close(peft_model(torch.tensor([ids])).logits, logits, rtol=0, atol=1e-5)

    merge.merge_into(model)
    merged = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name][:259], base[name][:259]) and len(base[name]) == 260
        mean = base[name][:259].mean(0)
        assert all((merged[name][i] - mean).abs().max() > 1e-4 for i in (259, 260)), "a new row has not moved"
    torch.testing.assert_close(model.logits(torch.tensor([ids])), logits, rtol=0, atol=1e-5)


def test_everything_trains_and_transformers_loads_it(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    section = {"add_tokens": list(NEW), "pad_token": "<filler>", "rows_multiple_of": 8}
    config = prepare(tmp_path / "m", tokenizer=section)
    train("full_sft", "--config", config)
    final = tmp_path / "m" / "out" / "final"
    ours = models.from_pretrained(final, dtype=torch.float32)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert ours.arch.vocab == theirs.config.vocab_size == 264 and tokenizer.pad_token == "<filler>"
    assert tokenizer.pad_token_id == 261 == tokenizers.from_pretrained(final).pad_id
    ids = torch.tensor([tokenizer.encode("say <red><|im_end|>")])
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), rtol=0, atol=1e-5)


def test_new_rows_begin_as_the_mean_on_every_path(tmp_path):
    """Read on meta, with a chunk that ends between rows, as in memory; spare rows count as new too."""
    from ftlib.models import load, resize

    folder = tmp_path / "m"
    prepare(folder)
    old = weights(folder)["model.embed_tokens.weight"]
    model = load.build(folder, torch.float32)
    found = load.check_weights(model, folder)
    assert resize.resize_embeddings(model, 262, 4) == slice(260, 264)
    resize._CHUNK, before = 100, resize._CHUNK
    try:
        grown = resize.Grown(found, model, (259, 260, 261))
        key = "model.embed_tokens.weight"
        whole = grown.read(key, (slice(0, 264), slice(0, old.shape[1])))
        part = grown.read(key, (slice(258, 263), slice(2, 5)))
    finally:
        resize._CHUNK = before
    assert torch.equal(whole[:259], old[:259]) and torch.equal(part, whole[258:263, 2:5])
    torch.testing.assert_close(whole[259:], old[:259].mean(0).expand(5, -1))


@pytest.mark.slow
def test_killed_runs_and_checkpoints_keep_them(tmp_path):
    """Last result (2026-11-23): passed."""
    config = prepare(tmp_path / "m", checkpoint={"every": 2}, schedule={"name": "constant"})
    whole = train("lora_sft", "--config", config)
    again = ("lora_sft", "--config", config, f"output_dir={tmp_path / 'again'}")
    train(*again, "steps=2")
    assert losses(train(*again)) == losses(whole)
    code, _, errors = tune("merge", tmp_path / "m", tmp_path / "m/out/checkpoints/step_000002", tmp_path / "merged")
    assert code == 0, errors
    assert tokenizers.from_pretrained(tmp_path / "merged").encode("<red>") == [259]
    assert weights(tmp_path / "merged")["lm_head.weight"].shape[0] == 261


REFUSED = {
    "frozen embedding": ("full_sft", {"train": {"freeze": ["embed_tokens"]}}, "tokenizer.add_tokens, train"),
    "factors on the head": ("lora_sft", {"lora": {"targets": ["lm_head"]}, "tied": False}, "modules_to_save"),
    "padding that ends": ("full_sft", {"tokenizer": {"pad_token": "<|im_end|>"}}, "tokenizer.pad_token"),
    "several processes": ("lora_sft", {"parallel": {"tp": 2}}, "parallel.tp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_it_starts(tmp_path, name):
    from ftlib import build
    from ftlib import config as configs
    from ftlib.plugins import load_file

    recipe, sections, words = REFUSED[name]
    file = prepare(tmp_path / "m", **sections)
    cfg = configs.load(load_file(ROOT / "recipes" / f"{recipe}.py").Config, ["--config", str(file)])
    with pytest.raises(UserError, match=words):
        build.check(cfg, 2 if "parallel" in sections else 1)


@pytest.mark.slow
def test_processes_that_share_the_model_train_the_same_rows(tmp_path):
    """Last result (2026-11-22): passed."""
    config = prepare(tmp_path / "m", batch={"rows": 4, "micro_rows": 2})
    one = train("lora_sft", "--config", config)
    arguments = ("--nproc-per-node", 2, "recipes/lora_sft.py", "--config", config, f"output_dir={tmp_path / 'two'}")
    code, _, errors = tune("run", *arguments, cwd=ROOT)
    assert code == 0, errors
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps(two) == pytest.approx(steps(one), rel=1e-5)
