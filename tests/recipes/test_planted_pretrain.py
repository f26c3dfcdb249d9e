"""What the pretraining loop hands on: weights of rows, the loss's rule, the limit of the norm, the step of the rate."""

import json

import pytest
from tiny_model import ROOT, losses, train

from ftlib import cli

SECTIONS = {"steps": 3, "schedule": {"name": "linear", "warmup_steps": 0}, "from_scratch": False}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs of pretraining on conversations, made once: `told`, the weight of every answer, and words."""

    def rows(folder, told):
        found = [json.loads(line) for line in tiny.rows.read_text().splitlines()]
        for number, row in enumerate(found):
            row["messages"][1]["weight"] = told(number)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return {"sources": [{"path": str(folder / "rows.jsonl")}], "seq_len": 64}

    def run(*words, told=lambda _: 1):
        folder = tmp_path_factory.mktemp("run")
        sections = SECTIONS | {"data": rows(folder, told), "output_dir": str(folder / "out")}
        return train("pretrain", "--config", tiny.config(folder, **sections), *words)

    return run, run()


def test_weights_count_in_the_sum_and_in_what_it_is_divided_by(runs):
    run, plain = runs
    assert losses(run(told=lambda _: 0.5)) == losses(plain)
    assert losses(run(told=lambda number: (0.25, 3)[number % 2])) != losses(plain)


def test_the_rule_of_the_loss_is_followed(runs):
    run, plain = runs
    first, without = (next(row["loss"] for row in rows if "loss" in row) for rows in (run("loss.z_loss=0.1"), plain))
    assert first - without > 1, "0.1 of the squared log of some 260 tokens"


def test_the_norm_is_limited_and_told_as_it_was(runs):
    """A large eps makes steps as long as gradients are."""
    run, _ = runs
    free, held = (run("optim.eps=1", f"optim.max_grad_norm={most}") for most in ("null", "1e-5"))
    assert losses(free)[0] == losses(held)[0] and losses(free)[1:] != losses(held)[1:]
    norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for rows in (free, held)]
    assert norms[0][0] == norms[1][0] > 1e-2


def test_rates_are_those_of_the_steps_from_one(runs):
    assert [row["lr"] / 1e-2 for row in runs[1] if "lr" in row] == pytest.approx([2 / 3, 1 / 3, 0])


def test_a_run_with_sizes_of_its_own_is_repeated_by_its_config(tiny, tmp_path, monkeypatch):
    """Its config.yaml, read from where it lies; and a check leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sections = SECTIONS | {"from_scratch": True, "data": {"sources": [{"path": str(tiny.rows)}], "seq_len": 64}}
    file = tiny.config(tmp_path, **sections, output_dir="out", sizes={"layers": 2, "dim": 32})
    assert cli.main(["validate", str(ROOT / "recipes/pretrain.py"), "--config", str(file), "output_dir=out"]) == 0
    assert not (tmp_path / "out").exists()
    first = train("pretrain", "--config", file, "output_dir=out")
    again = train("pretrain", "--config", tmp_path / "out" / "config.yaml", f"output_dir={tmp_path / 'again'}")
    assert losses(again) == losses(first)
