"""`tune eval`: the numbers of a run's own evaluation, of a model and of an adapter; mistakes."""

import json
import math

import pytest
from tiny_model import train, write_rows

from ftlib import cli


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """recipe -> the folder and the last evaluation of a run."""
    made = {}
    for recipe in ("lora_sft", "full_sft"):
        folder = tmp_path_factory.mktemp(recipe)
        file = tiny.config(folder, eval={"exact_match": 12, "max_new_tokens": 16})
        rows = train(recipe, "--config", file, f"output_dir={folder / 'out'}")
        made[recipe] = folder / "out" / "final", next(row for row in reversed(rows) if "eval_loss" in row)
    return made


def scored(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    return cli.main(["eval", *map(str, argv)]), *capsys.readouterr()


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft"])
def test_the_numbers_are_those_of_the_run(recipe, finished, tiny, tmp_path, capsys):
    model, wanted = finished[recipe]
    words = ["--exact-match", 12, "--max-new-tokens", 16, "--seq-len", 64, "--micro-rows", 4]
    code, out, err = scored(capsys, model, "--data", tiny.held_out, *words, "--out", tmp_path / "scores.json")
    assert code == 0, err
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
    assert found["exact_match"] == wanted["exact_match"] and len(found["answers"]) == 12
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert sum(row["right"] for row in found["answers"]) == 12 * found["exact_match"]
    assert f"loss {found['eval_loss']:.4f}, perplexity {found['perplexity']:.4f}" in out
    assert f"exact match: {found['exact_match']:.1%} of 12 answers" in out and "wrote " in out
    assert found["model"] == str(model)


def test_several_sets_have_a_loss_each_and_together(tiny, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", 30, seed=5)
    out = tmp_path / "s.json"
    code, _, err = scored(capsys, tiny.model, "--data", tiny.held_out, "--data", other, "--out", out)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["eval_loss_held_out"] != found["eval_loss_other"]
    low, high = sorted((found["eval_loss_held_out"], found["eval_loss_other"]))
    assert low < found["eval_loss"] < high and "exact_match" not in found and "answers" not in found
    code, said, _ = scored(capsys, tiny.model, "--data", other, "--split", "[:4]")
    assert code == 0 and "4 rows" in said


def test_text_has_a_loss_and_no_answers(tiny, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a text of some words, number {i}"}) + "\n" for i in range(4)))
    assert scored(capsys, tiny.model, "--data", text)[0] == 0
    code, _, err = scored(capsys, tiny.model, "--data", text, "--exact-match", 2)
    assert code == 2 and "no row is a conversation" in err and "--exact-match" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([], "--data"),
        (["--data", "x.jsonl", "--seq-len", 1], "--seq-len at least 2"),
        (["--data", "x.jsonl", "--out", "no/such/folder.json"], "lies in no folder"),
        (["--data", "x.jsonl", "--exact-macth", 3], "did you mean '--exact-match'"),
    ],
)
def test_mistakes_are_messages(words, said, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = scored(capsys, tiny.model, *words)
    assert code == 2 and said in err and "Traceback" not in err
