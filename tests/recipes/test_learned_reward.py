"""A reward model that recipes/reward.py trained, as the reward of recipes/grpo.py."""

import json
import random

import pytest
import rl_toys
import torch
from rl_lab import Lab
from tiny_model import train

from ftlib.errors import UserError
from ftlib.rl import reward_model, setup

DIGITS = "0123456789"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return rl_toys.write_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def judge(toy, tmp_path_factory):
    """A model that prefers answers of many sevens."""
    folder = tmp_path_factory.mktemp("judge")
    dice, rows = random.Random(0), []
    for _ in range(300):
        sides = sorted(
            ("".join(dice.choice(DIGITS + "777") for _ in range(3)) for _ in "ab"), key=lambda s: s.count("7")
        )
        if sides[0].count("7") < sides[1].count("7"):
            prompt = "".join(dice.choice(DIGITS) for _ in range(3))
            rows.append({"prompt": f"{prompt}=", "chosen": sides[1], "rejected": sides[0]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(toy)}, "data": {"sources": [{"path": str(folder / "pairs.jsonl")}], "seq_len": 128},
        "lora": None, "optim": {"lr": 3e-3}, "steps": 30, "batch": {"rows": 4, "micro_rows": 4}, "dtype": "fp32",
        "checkpoint": {"every": 0}, "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(values))
    assert train("reward", "--config", folder / "config.yaml")[-1]["accuracy"] >= 0.9
    return folder / "out/final"


def their_scores(folder, texts):
    """Scores of texts one by one, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [
            model.eval()(**tokenizer(t, add_special_tokens=False, return_tensors="pt")).logits.item() for t in texts
        ]


def test_scores_are_transformers_own_whatever_shares_a_row(toy, judge, tmp_path):
    lab = Lab(toy, tmp_path / "out", "copy", batch={"micro_rows": 2})
    scorer = reward_model.RewardModel(lab.cfg, str(judge), lab.run)
    dice = random.Random(1)
    said = ["".join(dice.choice(DIGITS) for _ in range(dice.randrange(1, 12))) for _ in range(60)]
    found = scorer(
        [[{"role": "user", "content": f"{i}="}] for i in range(60)],
        [[{"role": "assistant", "content": s}] for s in said],
    )
    assert found == pytest.approx(their_scores(judge, [f"{i}={s}<end>" for i, s in enumerate(said)]), abs=1e-5)


def test_the_policy_learns_what_the_judge_likes_and_the_judge_learns_nothing(toy, judge, tmp_path):
    before = (judge / "model.safetensors").read_bytes()
    values = rl_toys.settings(toy, "copy", tmp_path / "out", steps=25, rewards=[{"model": str(judge), "weight": 0.5}])
    made = []
    real = reward_model.RewardModel.__init__

    def keep(self, *args):
        real(self, *args)
        made.append((self.model, {k: v.clone() for k, v in self.model.state_dict().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_model.RewardModel, "__init__", keep)
        rows = rl_toys.learn(values)
    first, last = rl_toys.rewards(rows)
    assert last > first + 1 and rows[-1]["rewards/model/mean"] == pytest.approx(2 * rows[-1]["reward"])
    [(model, start)] = made
    assert all(p.grad is None and not p.requires_grad for p in model.parameters()) and not model.training
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert (judge / "model.safetensors").read_bytes() == before
    table = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").read_text().splitlines()]
    sevens = [sum(m["content"].count("7") for m in row["completion"]) for row in table]
    assert sum(sevens[-20:]) > 2 * sum(sevens[:20])


def test_what_is_no_reward_model_is_refused_before_a_run(toy, tmp_path):
    lab = Lab(toy, tmp_path / "out", "copy", rewards=[{"model": str(toy)}])
    with pytest.raises(UserError, match="LlamaForCausalLM gives no scores"):
        setup.check(lab.cfg)
