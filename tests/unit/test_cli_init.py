"""`tune init`: a config from rows, a model and this machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_model import ROOT, write_model, write_rows

from ftlib import cli, config, plugins


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder and 96 rows."""
    folder = tmp_path_factory.mktemp("init")
    return SimpleNamespace(model=write_model(folder / "model"), rows=write_rows(folder / "rows.jsonl", 96))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(capsys, *argv):
    """(code, output, errors) in this process."""
    code = cli.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_init_writes_a_config_that_trains(tiny, here, capsys):
    code, out, _ = tune(capsys, "init", tiny.rows, "--model", tiny.model, "--out", "my.yaml")
    assert code == 0 and "tune run recipes/lora_sft.py --config my.yaml" in out
    text = Path("my.yaml").read_text()
    assert len(text.splitlines()) <= 13 and "96 rows of messages, 35 tokens in the median row, at most" in text
    recipe = plugins.load_file(ROOT / "recipes/lora_sft.py")
    cfg = config.load(recipe.Config, ["--config", "my.yaml", "steps=1"])
    assert (Path(cfg.model.path), Path(cfg.data.sources[0].path)) == (tiny.model, tiny.rows)
    assert (cfg.data.seq_len, cfg.data.eval, cfg.dtype) == (256, 9.0, "fp32")
    assert len(recipe.main(cfg)) >= 2
    assert tune(capsys, "init", tiny.rows, "--out", "my.yaml")[0] == 2


@pytest.mark.parametrize("kind", ["pairs", "rated"])
def test_init_knows_preferences(tiny, here, capsys, kind):
    answers = [{"prompt": f"say {word}", "chosen": word, "rejected": "no"} for word in ("red", "blue", "green") * 8]
    if kind == "rated":
        answers = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in answers
            for side in ("chosen", "rejected")
        ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    code, out, err = tune(capsys, "init", "p.jsonl", "--model", tiny.model, "--out", "my.yaml")
    assert code == 0 and "tune run recipes/dpo.py --config my.yaml" in out, err
    assert ("dpo: {loss: kto}" in Path("my.yaml").read_text()) == (kind == "rated")
    assert tune(capsys, "validate", "dpo", "--config", "my.yaml")[0] == 0
    code, _, err = tune(capsys, "init", "p.jsonl", "--model", tiny.model, "--recipe", "lora_sft", "--out", "no.yaml")
    assert code == 2 and "data.sources[0]" in err and not Path("no.yaml").exists()


def test_init_of_long_pairs_makes_rows_for_both_answers(tiny, here, capsys):
    """Each answer may be as long as the model reads, 512 tokens; what is longer loses the beginning of its prompt."""
    pairs = [{"prompt": "x" * length, "chosen": "yes", "rejected": "no"} for length in (300, 320, 340)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert tune(capsys, "init", "p.jsonl", "--model", tiny.model, "--out", "my.yaml")[0] == 0
    assert "  seq_len: 768\n" in Path("my.yaml").read_text() and "overlong" not in Path("my.yaml").read_text()
    longer = [*pairs, {"prompt": "x" * 900, "chosen": "yes", "rejected": "no"}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    code, out, _ = tune(capsys, "init", "p.jsonl", "--model", tiny.model, "--out", "my.yaml", "--force")
    assert code == 0 and "25.0% of the rows are longer than seq_len 1024 and lose the beginning of their prompt" in out
    code, out, _ = tune(capsys, "validate", "dpo", "--config", "my.yaml")
    assert code == 0 and "training: 4 pairs" in out and "to 1,02" in out


@pytest.mark.parametrize("kind", ["pairs", "steps"])
def test_init_of_a_reward_model(tiny, here, capsys, kind):
    row = {"prompt": "2+2", "completions": ["two and two", "is 4"], "labels": [True, False]}
    row = row if kind == "steps" else {"prompt": "2+2", "chosen": "4", "rejected": "5"}
    Path("p.jsonl").write_text((json.dumps(row) + "\n") * 3)
    asked = ["--recipe", "reward"] if kind == "pairs" else []
    code, out, err = tune(capsys, "init", "p.jsonl", "--model", tiny.model, "--out", "my.yaml", *asked)
    assert code == 0 and "tune run recipes/reward.py --config my.yaml" in out, err
    assert ("reward: {kind: steps}" in Path("my.yaml").read_text()) == (kind == "steps")
    assert tune(capsys, "validate", "reward", "--config", "my.yaml")[0] == 0


def test_init_without_the_hub_guesses_lengths(tiny, here, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = tune(capsys, "init", tiny.rows, "--model", "org/never-cached", "--recipe", "full_sft")
    assert code == 0, err
    assert "cannot be reached: lengths are guessed" in out
    text = Path("rows.yaml").read_text()
    assert "model: {path: org/never-cached}" in text and "optim: {lr: 2e-5}" in text and ", about 2" in text


def test_init_names_a_template_where_the_tokenizer_has_none(tiny, here, capsys):
    bare = write_model(here / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = tune(capsys, "init", tiny.rows, "--model", "bare", "--out", "c.yaml")
    assert code == 0, err
    assert "\n  template: chatml\n" in Path("c.yaml").read_text() and "path: ./bare" in Path("c.yaml").read_text()
