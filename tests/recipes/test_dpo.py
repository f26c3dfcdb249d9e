"""The preference recipe in this process: it learns what is preferred, and only that; its reference is what it says."""

import json
import math
import random

import pytest
import torch
from tiny_model import ROOT, losses, steps, train, tune, undo, write_config

from ftlib import build, cli, config, plugins
from ftlib.errors import UserError
from ftlib.evaluation import metrics
from ftlib.sections import methods

WORDS = ("red", "blue", "green", "white", "black", "brown")
LN2 = math.log(2)


def write_pairs(file, count, seed=0, shuffled=False):
    """The answer that ends in `!` is better than the one that ends in `?`; shuffled: or the other way round."""
    dice = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            word = "".join(dice.choice(WORDS) for _ in range(2))
            sides = [f"{word}!", f"{word}?"]
            if shuffled:
                dice.shuffle(sides)
            out.write(json.dumps({"prompt": f"say {word}", "chosen": sides[0], "rejected": sides[1]}) + "\n")
    return file


@pytest.fixture(scope="module")
def toy(tiny, tmp_path_factory):
    """`toy(folder, **sections)`: a config on the tiny model and the toy pairs; `shuffled` ones beside them."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {
        (name, shuffled): write_pairs(folder / f"{name}_{shuffled}.jsonl", count, seed, shuffled)
        for name, count, seed in (("train", 100, 0), ("held_out", 24, 1))
        for shuffled in (False, True)
    }

    def config(where, shuffled=False, **sections):
        rows, held_out = files["train", shuffled], files["held_out", shuffled]
        settings = {
            "steps": 16,
            "batch": {"rows": 2, "micro_rows": 2},
            "data": {"sources": [{"path": str(rows)}], "seq_len": 256},
            "lora": {"rank": 4},
            "checkpoint": {"every": 0},
        }
        sections["data"] = settings["data"] | sections.get("data", {})
        return write_config(where / "config.yaml", tiny.model, rows, held_out, **settings | sections)

    return config


def first_and_last(rows, key):
    return rows[0][key], rows[-1][key]


def test_first_loss_is_ln_2_and_the_preference_is_learnt(toy, tmp_path, capsys):
    rows = train("dpo", "--config", toy(tmp_path))
    assert "loss: -ls(0.1 d)" in capsys.readouterr().out
    trained = [row for row in rows if "loss" in row]
    assert abs(trained[0]["loss"] - LN2) < 1e-6 and trained[0]["rewards_chosen"] == trained[0]["rewards_rejected"] == 0
    assert first_and_last(rows, "eval_accuracy") == (0.5, 1.0)  # all tie before the first step
    recipe = plugins.load_file(ROOT / "recipes/dpo.py")
    cfg = config.load(recipe.Config, ["--config", str(tmp_path / "config.yaml"), "eval.metric=eval_margin"])
    assert list(rows[0]) == ["step", *metrics.names(cfg)], "what eval.metric may be is known before"
    with pytest.warns(UserWarning, match=r"eval_margin picks what .*keep_best .*neither is set"):
        build.check(cfg)
    assert abs(rows[0]["eval_loss"] - LN2) < 1e-6 and rows[-1]["eval_loss"] < 0.5
    assert trained[-1]["margin"] == pytest.approx(trained[-1]["rewards_chosen"] - trained[-1]["rewards_rejected"])
    assert trained[-1]["accuracy"] == 1.0 and trained[-1]["logps_chosen"] > trained[-1]["logps_rejected"]
    per_token = [row[f"logps_{side}"] / row[f"length_{side}"] for row in trained for side in ("chosen", "rejected")]
    found = [row[f"token_logps_{side}"] for row in trained for side in ("chosen", "rejected")]
    assert found == pytest.approx(per_token, rel=0.05), "answers of nearly one length"


def test_shuffled_labels_teach_nothing(toy, tmp_path):
    rows = train("dpo", "--config", toy(tmp_path, shuffled=True))
    assert 0.3 <= rows[-1]["eval_accuracy"] <= 0.7 and rows[-1]["eval_loss"] > 0.6


@pytest.mark.parametrize("name", ["kto"])
def test_another_loss_learns_it_too(name, toy, tmp_path):
    assert train("dpo", "--config", toy(tmp_path), f"dpo.loss={name}")[-1]["eval_accuracy"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "sft"])  # imitation prefers nothing
def test_every_loss_learns_it_and_nothing_else(name, toy, tmp_path):
    """Last result: 24 losses passed, of shuffled labels 17 of 24 right at most (chance: 12, give or take 2.4)."""
    real, flat = (
        train("dpo", "--config", toy(tmp_path, shuffled), f"dpo.loss={name}", f"output_dir={tmp_path}/{shuffled}")
        for shuffled in (False, True)
    )
    assert real[-1]["eval_accuracy"] >= 0.95 and 0.25 <= flat[-1]["eval_accuracy"] <= 0.75


def test_micro_batches_do_not_change_the_numbers(toy, tmp_path):
    """Not kto's either, whose baseline belongs to the whole step."""
    file = toy(tmp_path, steps=3, dpo={"loss": "kto"}, batch={"rows": 4, "micro_rows": 4})
    runs = [train("dpo", "--config", file, f"batch.micro_rows={n}", f"output_dir={tmp_path}/{n}") for n in (4, 1)]
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), rel=1e-5)


def test_sharing_prompts_does_not_change_the_numbers(toy, tmp_path):
    """With a row for each step's pairs, whatever they take: rows that hold more would make other steps."""
    file = toy(tmp_path, steps=3, data={"pack": False})
    runs = [
        train("dpo", "--config", file, f"dpo.share_prompt={share}", f"output_dir={tmp_path}/{share}")
        for share in ("false", "true")
    ]
    assert steps(runs[1]) == pytest.approx(steps(runs[0]), rel=1e-5) and len(set(steps(runs[0]))) == 3
    assert runs[1][1]["tokens"] < runs[0][1]["tokens"]
    assert runs[1][-1]["eval_loss"] == pytest.approx(runs[0][-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("loss", ["bco", "mpo"])
def test_resumed_equals_never_stopped(loss, toy, tmp_path, capsys):
    """The mean reward of bco is state too, also where it is one of several losses."""
    file = toy(tmp_path, steps=4, dpo={"loss": loss}, checkpoint={"every": 2, "keep": 3})
    whole = train("dpo", "--config", file)
    undo(tmp_path / "out", 2)
    again = train("dpo", "--config", file)
    assert "resuming from step_000002" in capsys.readouterr().out
    state = json.loads((tmp_path / "out/checkpoints/step_000004/state.json").read_text())["extra"]
    assert state["mean_reward"] != 0 and state["rewards"] > 0
    assert losses(again) == losses(whole) and len(losses(whole)) == 4
    assert again[-1] == whole[-1] and len(set(losses(whole))) == 4


def test_the_cached_reference_is_the_one_that_is_switched_off(toy, tmp_path):
    file = toy(tmp_path, steps=3)
    off = train("dpo", "--config", file, f"output_dir={tmp_path}/off")
    kept = train("dpo", "--config", file, "dpo.reference=cache", f"output_dir={tmp_path}/kept")
    assert steps(kept) == pytest.approx(steps(off), rel=1e-5)
    assert kept[-1]["eval_loss"] == pytest.approx(off[-1]["eval_loss"], rel=1e-5)
    names = sorted(path.name.rsplit("_", 1)[0] for path in (tmp_path / "kept/reference").iterdir())
    assert names == ["eval_held_out_False", "train"]


def test_every_weight_learns_with_a_cached_reference(toy, tmp_path):
    file = toy(tmp_path, lora=None, optim={"lr": 2e-3}, steps=10, checkpoint={"every": 5, "keep": 3})
    whole = train("dpo", "--config", file)
    assert abs(steps(whole)[0] - LN2) < 1e-6 and whole[-1]["eval_accuracy"] == 1.0
    out = tmp_path / "out"
    assert (out / "final/model.safetensors").is_file()
    undo(out, 5)
    cached = {path: path.stat().st_mtime_ns for path in (out / "reference").iterdir()}
    again = train("dpo", "--config", file)
    assert losses(again) == losses(whole)
    assert {path: path.stat().st_mtime_ns for path in (out / "reference").iterdir()} == cached, "it is read again"


def test_going_on_from_an_adapter_compares_with_that_adapter(toy, tmp_path):
    file = toy(tmp_path, steps=3)
    train("dpo", "--config", file, f"output_dir={tmp_path}/first")
    more = f"lora={{start_from: {tmp_path}/first/final}}"
    second = train("dpo", "--config", file, more, f"output_dir={tmp_path}/second")
    assert abs(steps(second)[0] - LN2) < 1e-6, "the reference is the adapter, not the base"
    assert steps(second)[2] < LN2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.dropout=0.1", "lora.dropout"),
        ("data.overlong=split", "an answer cannot be split"),
        ("eval.exact_match=4", "eval.exact_match"),
        ("eval.prompts=[hi]", "nothing is generated in an evaluation here"),
        ("log.statistics=2", "log.statistics"),
        ("dpo={loss: aot}", "aot sorts all pairs"),
        ("lora=null", "dpo.reference"),
    ],
)
def test_what_does_not_go_together_is_refused(override, says, toy, tmp_path):
    file = toy(tmp_path, batch={"rows": 4, "micro_rows": 2})
    more = ["dpo.reference=adapter_off"] if override == "lora=null" else []
    with pytest.raises(UserError, match=says):
        train("dpo", "--config", file, override, *more)


def test_answers_on_several_processes_are_refused_before_anything_is_loaded(toy, tmp_path):
    cfg = config.load(
        plugins.load_file(ROOT / "recipes/dpo.py").Config, ["--config", str(toy(tmp_path)), "parallel.cp=2"]
    )
    with pytest.raises(UserError, match="answers cannot lie on several processes"):
        build.check(cfg, 2)


def test_a_copy_runs_from_an_empty_folder(toy, tmp_path):
    toy(tmp_path, steps=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, said, errors = tune("cp", "recipes/dpo.py", "my.py", cwd=empty)
    assert code == 0, errors
    copied = empty / "my.py"
    copied.write_text(
        copied.read_text().replace("    objective = resolve(", "    print('mine')\n    objective = resolve(")
    )
    code, said, errors = tune("run", "my.py", "--config", tmp_path / "config.yaml", "output_dir=out", cwd=empty)
    assert code == 0 and "mine" in said, errors
    assert (empty / "out/final/adapter_model.safetensors").is_file()


def test_commands_know_the_recipe(toy, tmp_path, capsys):
    file = str(toy(tmp_path))
    assert cli.main(["validate", "recipes/dpo.py", "--config", file]) == 0
    assert cli.main(["preview", "recipes/dpo.py", "--config", file, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "ok: " in said and said.count("[[") == said.count("assistant") == 2
    assert cli.main(["validate", "recipes/dpo.py", "--config", file, "dpo.loss=simp"]) == 2
    assert "did you mean 'simpo'" in capsys.readouterr().err


def test_the_demo(tmp_path):
    rows = train("dpo", "--config", ROOT / "configs/demo_dpo.yaml", f"output_dir={tmp_path}", "steps=10")
    assert abs(steps(rows)[0] - LN2) < 1e-6
    assert rows[-1]["eval_loss"] < 0.4 and rows[-1]["eval_accuracy"] >= 0.95


@pytest.mark.slow
def test_compiled_blocks_switch_their_adapters_off(toy, tmp_path):
    """A toggle that the compiler had made a constant would leave the loss at ln 2."""
    file = toy(tmp_path, steps=3, memory={"recompute": "none", "compile": True})
    compiled = train("dpo", "--config", file, f"output_dir={tmp_path}/a")
    eager = train("dpo", "--config", file, "memory.compile=false", f"output_dir={tmp_path}/b")
    assert abs(steps(compiled)[0] - LN2) < 1e-6 and steps(eager)[2] < steps(eager)[0]
    assert steps(compiled) == pytest.approx(steps(eager), rel=1e-4)
    assert torch.is_grad_enabled()
