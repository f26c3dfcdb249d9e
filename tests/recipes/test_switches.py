"""Switches of fine-tuning, on and off: off is what it was to the bit, on changes what the formula says it changes."""

import json

import pytest
import yaml
from tiny_model import ROOT, losses, steps, train, tune


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A function: words -> the rows of a short full fine-tune with them; each is trained once."""
    folder, known = tmp_path_factory.mktemp("switches"), {}

    def run(*words, recipe="full_sft"):
        if (recipe, words) not in known:
            file = tiny.config(folder, steps=4, schedule={"name": "constant", "warmup_steps": 0})
            known[recipe, words] = train(recipe, "--config", file, f"output_dir={folder}/{len(known)}", *words)
        return known[recipe, words]

    return run


def test_off_is_the_plain_loss_to_the_bit(runs):
    off = runs("loss.name=cross_entropy", "loss.z_loss=0", "neftune=0")
    assert losses(off) == losses(runs())


def test_dft_weighs_the_loss_by_the_probability(runs):
    first, plain = steps(runs("loss.name=dft"))[0], steps(runs())[0]
    assert first < 0.2 * plain, "p < 0.1 where nothing is learnt yet"
    assert runs("loss.name=dft")[-1]["eval_loss"] < runs()[0]["eval_loss"], "it learns"


def test_eaft_of_an_untrained_model_is_nearly_the_plain_loss(runs):
    """Its entropy over 20 logits is nearly log 20, which divided by 3 is nearly 1."""
    first, plain = steps(runs("loss.name=eaft"))[0], steps(runs())[0]
    assert first == pytest.approx(plain, rel=0.05) and first != plain
    assert runs("loss.name=eaft")[-1]["eval_loss"] < 0.8 * runs()[0]["eval_loss"]


def test_z_loss_adds_its_term(runs):
    assert steps(runs("loss.z_loss=0.1"))[0] > steps(runs())[0] + 0.1 * 3.0**2  # log Z of 260 even logits is above 5


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_neftune_disturbs_training_and_no_evaluation(recipe, runs):
    on, off = runs("neftune=5", recipe=recipe), runs(recipe=recipe)
    assert on[0] == off[0], "evaluated before the first step"
    assert all(a != b for a, b in zip(losses(on), losses(off), strict=True))


def test_neftune_where_processes_share_a_row_s_tokens_is_refused(tiny, tmp_path):
    file = tiny.config(tmp_path, steps=1)
    run = ("validate", "--nproc-per-node", 2, ROOT / "recipes" / "full_sft.py", "--config", file, "parallel.tp=2")
    code, _, errors = tune(*run, "neftune=5")
    assert code == 2 and "the same noise for different tokens" in errors and "neftune (command line)" in errors


def test_schedule_free_evaluates_and_keeps_the_average(tiny, tmp_path):
    """What final/ holds is what was evaluated; while training the weights are others."""
    settings = {"optim": {"name": "schedule_free", "lr": 1e-2}, "schedule": {"name": "constant"}, "eval": {"every": 3}}
    file = tiny.config(tmp_path, steps=6, **settings)
    rows = train("full_sft", "--config", file)
    file = tiny.config(tmp_path, steps=1, optim={"lr": 1e-9}, output_dir=str(tmp_path / "again"))
    again = train("full_sft", "--config", file, f"model.path={tmp_path}/out/final")
    assert again[0]["eval_loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)
    file = tiny.config(tmp_path, steps=6, **settings | {"eval": {}}, output_dir=str(tmp_path / "never"))
    assert losses(train("full_sft", "--config", file)) == losses(rows), "evaluating changes nothing"


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft", "pretrain"])
def test_shares_are_of_the_steps_that_epochs_make(recipe, tiny, tmp_path, capsys):
    """What was written stays in the config, what it became is said, and a run that is longer now goes on."""
    schedule = {"name": "wsd", "warmup_steps": 0.3, "decay_steps": 0.2}
    shares = {"eval": {"every": 0.3}, "checkpoint": {"every": 0.4, "keep": 9}, "schedule": schedule}
    words = ("--config", tiny.config(tmp_path, epochs=0.48, steps=None, **shares))
    rows, out = train(recipe, *words), tmp_path / "out"
    became = "of 10 steps: schedule.warmup_steps 0.3 is 3, schedule.decay_steps 0.2 is 2, eval.every 0.3 is 3"
    assert f"{became}, checkpoint.every 0.4 is 4\n" in capsys.readouterr().out
    rates = [row["lr"] / 1e-2 for row in rows if "lr" in row]
    assert rates == pytest.approx([1 / 3, 2 / 3, *[1] * 6, 0.5, 0])
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 9, 10]
    saved = lambda: sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step_*"))  # noqa: E731
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert saved() == [4, 8, 10] and all(kept[name].items() >= shares[name].items() for name in shares)
    longer = train(recipe, *words, "steps=15")
    assert losses(longer)[:10] == losses(rows) and len(steps(longer)) == 15 and saved() == [4, 8, 10, 12, 15]
    assert [row["step"] for row in longer if "eval_loss" in row] == [0, 3, 6, 9, 10, 12, 15]


@pytest.mark.parametrize("init", ["pissa", "kaiming"])
def test_a_start_inside_the_weights_tells_the_rank_that_is_written(init, tiny, tmp_path, capsys):
    file = tiny.config(tmp_path, steps=1, lora={"rank": 2, "init": init})
    train("lora_sft", "--config", file, f"output_dir={tmp_path}/out")
    rank = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())["r"]
    assert rank == (4 if init == "pissa" else 2)
    assert ("has twice the rank (lora.rank=2: 4)" in capsys.readouterr().out) == (init == "pissa")
