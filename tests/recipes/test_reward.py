"""Reward models in this process: they learn to score, and transformers gives the same scores."""

import json
import random

import pytest
import torch
from tiny_model import losses, steps, train, undo, write_config

from ftlib import cli, tokenizers
from ftlib.errors import Problems, UserError

WORDS = ("red", "blue", "green", "white", "black", "brown")


def write_pairs(file, count, seed=0, margin=False):
    """The answer that ends in `!` is better than the one that ends in `?`."""
    dice = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            word = dice.choice(WORDS) + dice.choice(WORDS)
            row = {"prompt": f"say {word}", "chosen": f"{word}!", "rejected": f"{word}?"}
            out.write(json.dumps(row | ({"margin": 2.0} if margin else {})) + "\n")
    return file


def write_steps(file, count, seed=0):
    """A step that ends in `!` is right."""
    dice = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            labels = [dice.random() < 0.5 for _ in range(3)]
            texts = [dice.choice(WORDS) + "?!"[label] for label in labels]
            out.write(json.dumps({"prompt": "go", "completions": texts, "labels": labels}) + "\n")
    return file


@pytest.fixture(scope="module")
def toy(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    makers = {"pairs": write_pairs, "steps": write_steps}
    files = {
        kind: [make(folder / f"{kind}{seed}.jsonl", count, seed) for seed, count in ((0, 100), (1, 20))]
        for kind, make in makers.items()
    }

    def config(where, kind="pairs", **sections):
        rows, held_out = files[kind]
        settings = {
            "reward": {"kind": kind},
            "steps": 16,
            "batch": {"rows": 2, "micro_rows": 2},
            "data": {"sources": [{"path": str(rows)}], "seq_len": 256},
            "lora": {"rank": 4, "modules_to_save": ["score"]},
            "checkpoint": {"every": 0},
        }
        return write_config(where / "config.yaml", tiny.model, rows, held_out, **settings | sections)

    config.files = files
    return config


def their_scores(folder, texts):
    """Scores of texts, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, said = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and model.config.num_labels == 1
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_transformers_scores_held_out_answers_alike(lora, toy, tmp_path):
    sections = {} if lora else {"lora": None, "optim": {"lr": 2e-3}}
    rows = train("reward", "--config", toy(tmp_path, **sections))
    assert rows[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6), "every score is 0 at first"
    assert rows[0]["eval_accuracy"] == 0.5 and rows[-1]["eval_accuracy"] == 1.0
    folder = tmp_path / "out/final"
    tokenizer = tokenizers.from_pretrained(folder)
    pairs = [json.loads(line) for line in toy.files["pairs"][1].read_text().splitlines()]
    sides = []
    for side in ("chosen", "rejected"):
        turns = [(("user", pair["prompt"]), ("assistant", pair[side])) for pair in pairs]
        messages = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
        sides.append(their_scores(folder, [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]))
    assert (sides[0] - sides[1]).mean().item() == pytest.approx(rows[-1]["eval_margin"], rel=1e-5)
    assert rows[-1]["eval_margin"] > 0.5 and abs((sides[0] + sides[1]).mean()) < 2, "scores stay around 0"


def test_a_reward_model_goes_on_as_one_and_resumes_to_the_bit(toy, tmp_path, capsys):
    file = toy(tmp_path, steps=4, checkpoint={"every": 2, "keep": 3})
    first = train("reward", "--config", file)
    undo(tmp_path / "out", 2)
    assert losses(train("reward", "--config", file)) == losses(first)
    assert "resuming from step_000002" in capsys.readouterr().out
    assert cli.main(["generate", f"{tmp_path}/out/final", "--prompt", "hi"]) == 2
    assert "ForSequenceClassification: it scores texts and writes none" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"other settings:\n    reward\.centre: 0\.01 then, 0\.5 now\n"):
        train("reward", "--config", file, "reward.centre=0.5")
    more = train("reward", "--config", file, f"model.path={tmp_path}/out/final", f"output_dir={tmp_path}/more")
    assert more[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-5)


def test_a_margin_asks_for_more(toy, tmp_path):
    rows = write_pairs(tmp_path / "wide.jsonl", 60, margin=True)
    file = toy(tmp_path, steps=1)
    path = f"data.sources[0].path={rows}"
    wide = train("reward", "--config", file, path, f"output_dir={tmp_path}/a")
    plain = train("reward", "--config", file, path, "reward.margin=false", f"output_dir={tmp_path}/b")
    assert steps(plain)[0] == pytest.approx(0.693147, abs=1e-6)
    assert steps(wide)[0] == pytest.approx(2.126928, abs=1e-6)  # log(1 + e^2)


def test_steps_are_judged_where_they_end(toy, tmp_path, capsys):
    from transformers import AutoModelForTokenClassification

    rows = train("reward", "--config", toy(tmp_path, "steps", steps=24))
    assert rows[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6) and rows[0]["eval_accuracy"] == 0.5
    assert rows[-1]["eval_accuracy"] >= 0.95
    folder = tmp_path / "out/final"
    assert cli.main(["generate", str(folder), "--prompt", "hi"]) == 2
    assert "transformers loads this one by AutoModelForTokenClassification" in capsys.readouterr().err
    model, said = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    tokenizer, right, count = tokenizers.from_pretrained(folder), 0, 0
    for line in toy.files["steps"][1].read_text().splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        for step, label in zip(row["completions"], row["labels"], strict=True):
            ids = ids + tokenizer.encode(step + "\n")
            with torch.no_grad():
                right += int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()) == label
            count += 1
    assert right / count == pytest.approx(rows[-1]["eval_accuracy"])


def test_keys_of_the_other_kind_are_refused(toy, tmp_path):
    for kind, word in (("pairs", "reward.last_step=true"), ("steps", "reward.margin=false")):
        with pytest.raises(Problems, match=rf"is for kind \w+, and this is {kind}; leave it out"):
            train("reward", "--config", toy(tmp_path, kind), word)


def test_the_head_always_trains(toy, tmp_path):
    file = toy(tmp_path, steps=1)
    for override, says in (("lora.modules_to_save=[]", "add score to it"), ("data.overlong=split", "cannot be split")):
        with pytest.raises(UserError, match=says):
            train("reward", "--config", file, override)
    file.write_text(file.read_text().replace(', "modules_to_save": ["score"]', ""))
    assert len(train("reward", "--config", file)) == 3, "score is what the recipe's own default says"


@pytest.mark.parametrize("word", ["quantize: int8", "fp8: tensorwise, fp8_smallest: 16"])
def test_adapters_on_weights_of_few_bits_are_refused_before_the_first_step(word, tiny, toy, tmp_path):
    """They could not be merged, which was found out after the last."""
    with pytest.raises(UserError, match="weights in few bits take no adapter in"):
        train("reward", "--config", toy(tmp_path), f"model={{path: '{tiny.model}', {word}}}")
    assert not (tmp_path / "out").exists()
