"""The shipped demo: a held-out score that climbs, and one that stays flat when the answers are shuffled."""

import json
import random

import pytest
from tiny_model import ROOT, train

from ftlib.models import hub


def scores(*settings: object) -> list[float]:
    """Exact match before and after the LoRA demo; fewer answers are asked than on the screen, to be quick."""
    rows = train("lora_sft", "--config", ROOT / "configs" / "demo_lora.yaml", *settings)
    return [row["exact_match"] for row in rows if "exact_match" in row]


def test_the_score_on_items_never_seen_climbs(tmp_path):
    before, after = scores(f"output_dir={tmp_path}", "eval.exact_match=50", "steps=40")
    assert before <= 0.2 and after >= 0.8


@pytest.mark.slow
def test_with_shuffled_answers_it_stays_flat(tmp_path):
    """Last result (2026-11-22): passed."""
    rows = [json.loads(line) for line in hub.resolve("ftlib:demo/data/lora_train.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    random.Random(0).shuffle(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["messages"][-1]["content"] = answer
    file = tmp_path / "shuffled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    settings = (f"output_dir={out}", "eval.exact_match=50", "steps=40", f"data.sources=[{{path: '{file}'}}]")
    before, after = scores(*settings)
    assert before <= 0.1 and after <= 0.1


def test_eval_items_are_not_in_the_training_data():
    train_rows, eval_rows = (
        {json.loads(line)["messages"][0]["content"] for line in hub.resolve(f"ftlib:demo/data/{name}.jsonl").open()}
        for name in ("lora_train", "lora_eval")
    )
    assert not train_rows & eval_rows and len(eval_rows) == 200
