"""Switches of pretraining, each on and off on one run, and a run with it that goes on where it stopped."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import ROOT, losses, probe, steps, train, tune, write_config

from ftlib import cli, config, models, plugins
from ftlib.errors import UserError

STEPS = 8
SETTINGS = {
    "from_scratch": True,
    "schedule": {"name": "constant", "warmup_steps": 0},
    "checkpoint": {"every": 3},
    "optim": {"lr": 1e-2},
    "steps": STEPS,
}


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    """A function: words -> the rows of a pretraining run with them and its folder; each is trained once."""
    folder, known = tmp_path_factory.mktemp("research"), {}
    dice = random.Random(0)
    texts = [" ".join(dice.choices(("red", "green", "blue"), k=dice.randint(3, 20))) for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"sources": [{"path": str(folder / "texts.jsonl")}], "seq_len": 64, "eval": 0.1}

    def run(*words):
        if words not in known:
            out = folder / str(len(known))
            file = write_config(folder / "config.yaml", tiny.model, tiny.rows, **SETTINGS, data=dict(data))
            known[words] = train("pretrain", "--config", file, f"output_dir={out}", *words), out
        return known[words]

    return run


def stopped_and_resumed(lab, *words):
    """The losses of a run, and of one that stopped after step 4, between checkpoints' period, and went on."""
    whole, _ = lab(*words)
    _, out = lab(*words, "steps=4")
    again = train("pretrain", "--config", out / "config.yaml", f"steps={STEPS}")
    return whole, again


def refused(lab, *words, match, world=1):
    """A config that is wrong before anything is loaded."""
    recipe = plugins.load_file(ROOT / "recipes" / "pretrain.py")
    cfg = config.load(recipe.Config, ["--config", str(lab()[1] / "config.yaml"), *words])
    with pytest.raises(UserError, match=match):
        recipe.check(cfg, world)


def test_mtp_adds_its_loss_and_changes_what_is_learnt(lab):
    off, on = lab()[0], lab("mtp.depth=1")[0]
    assert losses(lab("mtp.depth=0", "mtp.weight=0.5")[0]) == losses(off), "off is what it was, to the bit"
    assert on[0] == off[0], "evaluated before the first step: only the next token counts"
    added = [a - b for a, b in zip(steps(on), steps(off), strict=True)]
    assert added[0] == pytest.approx(0.3 * steps(off)[0], rel=0.15), "a second prediction, of as little"
    parts = [row["mtp_loss"] for row in on if "loss" in row]
    assert parts[0] == pytest.approx(added[0], rel=1e-5) and not any("mtp_loss" in row for row in off)
    assert steps(on)[-1] < 0.5 * steps(on)[0] and on[-1]["eval_loss"] != off[-1]["eval_loss"]
    assert on[-1]["eval_loss"] < 0.6 * on[0]["eval_loss"]


def test_mtp_goes_on_to_the_bit_and_leaves_a_plain_model(lab, capsys):
    whole, again = stopped_and_resumed(lab, "mtp.depth=2")
    assert losses(again) == losses(whole) and again[-1]["eval_loss"] == whole[-1]["eval_loss"]
    final = lab("mtp.depth=2")[1] / "final"
    assert (final / "mtp" / "model.safetensors").is_file()
    model = models.from_pretrained(final)
    assert model.mtp is None and probe(model.logits).isfinite().all()
    assert not any("mtp" in key for key in json.dumps(json.loads((final / "config.json").read_text())))
    checkpoint = final.parent / "checkpoints" / f"step_{STEPS:06}"
    assert cli.main(["merge", str(final), str(checkpoint), str(final.parent / "merged")]) == 0
    assert capsys.readouterr().err.count("what predicts further tokens (mtp) is left out") == 1
    assert torch.equal(probe(models.from_pretrained(final.parent / "merged").logits), probe(model.logits))


def test_mtp_continues_with_the_modules_that_were_saved(lab):
    final = lab("mtp.depth=2")[1] / "final"
    on = ("mtp.depth=2", f"model.path={final}", "from_scratch=false", "optim.lr=1e-6", "steps=1")
    kept = steps(lab(*on)[0])[0]
    (final / "mtp").rename(final.parent / "mtp")
    fresh = steps(lab(*on, "seed=0")[0])[0]
    assert kept < 0.8 * fresh


@pytest.mark.slow
def test_mtp_on_two_processes_is_mtp_on_one(lab, tmp_path):
    """Weights, modules among them, in shards: the same losses, and the same files. Last result (2026-11-22): passed."""
    rows, out = lab("mtp.depth=1")
    words = ("--config", out / "config.yaml", f"output_dir={tmp_path}", "steps=4", "parallel.dp_shard=2")
    code, _, errors = tune("run", "--nproc-per-node", "2", "recipes/pretrain.py", *words, "batch.micro_rows=2")
    assert code == 0, errors
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps(found) == pytest.approx(steps(rows)[:4], rel=1e-5)
    names = [set(load_file(folder / "final" / "mtp" / "model.safetensors")) for folder in (tmp_path, out)]
    assert names[0] == names[1]


def test_ssmax_changes_attention_and_goes_on_to_the_bit(lab):
    off = lab()[0]
    whole, again = stopped_and_resumed(lab, "context.ssmax=0.168")
    assert losses(whole)[0] != losses(off)[0] and whole[-1]["eval_loss"] < 0.7 * whole[0]["eval_loss"]
    assert losses(again) == losses(whole) and again[-1]["eval_loss"] == whole[-1]["eval_loss"]
    model = models.from_pretrained(lab("context.ssmax=0.168")[1] / "final")
    learned = torch.stack([block.self_attn.ssmax for block in model.model.layers])
    assert (learned != 0.168).all() and learned.unique().numel() == learned.numel(), "each head has its own"


def test_what_does_not_go_with_ssmax_is_refused(lab):
    both = r"where: context\.ssmax\n  fix: set from_scratch=true, or leave out what .*: ~context\.ssmax"
    refused(lab, "context.ssmax=0.168", "from_scratch=false", match=both)
    refused(lab, "context.ssmax=0.168", "context.skip=true", match=r"context\.skip")
    final = lab("context.ssmax=0.168")[1] / "final"
    refused(lab, f"model.path={final}", "from_scratch=false", "context.skip=true", match=r"context\.skip")


@pytest.mark.parametrize(
    "words", [["parallel.tp=2"], ["parallel.cp=2", "parallel.dp_shard=1"], ["mtp.depth=64"]], ids=str
)
def test_mtp_where_tokens_ahead_are_elsewhere_is_refused(lab, words):
    refused(lab, "mtp.depth=1", *words, world=2 if "parallel" in words[0] else 1, match=r"mtp\.depth")
