"""A small model that somebody else trained: golden logits, its greedy story, and a fine-tune on real conversations."""

import json
import math

import pytest
import torch
from shared_data import shared
from tiny_model import steps, train, write_config

from ftlib import cli, models, tokenizers


@pytest.fixture(scope="module")
def stories():
    return shared("tiny_models/stories260K/hf")


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("tiny_models/stories260K/golden_logits.json").read_text())


def test_golden_logits(stories, golden):
    model, tokenizer = models.from_pretrained(stories), tokenizers.from_pretrained(stories)
    for case in golden["cases"]:
        assert tokenizer.encode(case["prompt"], bos=True) == case["input_ids"]
        with torch.no_grad():
            logits = model.logits(torch.tensor([case["input_ids"]]))[0]
        assert logits[-1, :16].tolist() == pytest.approx(case["last_logits_first16"], abs=2e-5)
        assert logits[-1].topk(5).indices.tolist() == case["last_top5_ids"]
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(case["input_ids"][1:])[:, None])[:, 0]
        assert logprobs.tolist() == pytest.approx(case["token_logprobs"], abs=2e-5)


def test_greedy_story_by_the_command(stories, golden, capsys):
    first = golden["expected_stdout"].split(",")[0]
    assert first == "Once upon a time"
    # The golden text is 200 steps from BOS; the prompt is the five tokens with which it begins.
    assert cli.main(["generate", str(stories), "--raw", "--prompt", first, "--max-new-tokens", "196"]) == 0
    out, errors = capsys.readouterr()
    assert "cut off" in errors
    assert (first + out).rstrip("\n").startswith(golden["expected_stdout"].rstrip("\n"))


def test_lora_on_real_conversations(stories, tmp_path, capsys):
    rows = shared("instruct/lf_v1_sft_demo.jsonl")
    data = {"sources": [{"path": str(rows)}], "eval": 0.1, "seq_len": 256, "template": "chatml"}
    file = write_config(tmp_path / "config.yaml", stories, rows, data=data, steps=12, optim={"lr": 5e-3})
    with pytest.warns(UserWarning, match="no token for"):
        found = train("lora_sft", "--config", file)
    assert steps(found)[-1] < 0.9 * steps(found)[0]
    assert found[-1]["eval_loss"] < 0.9 * found[0]["eval_loss"]
    capsys.readouterr()
    final = str(tmp_path / "out" / "final")
    assert cli.main(["generate", final, "--prompt", "hi", "--max-new-tokens", "12"]) == 0
    assert cli.main(["merge", str(stories), final, str(tmp_path / "merged")]) == 0
    assert cli.main(["generate", str(tmp_path / "merged"), "--prompt", "hi", "--max-new-tokens", "12"]) == 0
    adapter, merged = (line for line in capsys.readouterr().out.splitlines() if not line.startswith("merged "))
    assert adapter == merged


def test_dpo_on_real_pairs(stories, tmp_path, capsys):
    """From ln 2 downwards; pairs that are longer than a row are counted."""
    rows = shared("preference/lf_dpo_en_demo.json")
    data = {"sources": [{"path": str(rows)}], "seq_len": 512, "template": "chatml"}
    file = write_config(
        tmp_path / "config.yaml", stories, rows, data=data, steps=8, optim={"lr": 3e-4}, lora={"rank": 8},
        batch={"rows": 2, "micro_rows": 1},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no token for"):
        found = train("dpo", "--config", file)
    assert abs(steps(found)[0] - math.log(2)) < 1e-6 and found[0]["accuracy"] == 0.5  # all tie
    assert sum(steps(found)[-3:]) / 3 < 0.6 and found[-1]["accuracy"] == 1
    assert "dropped 194: longer than data.seq_len=512" in capsys.readouterr().out
