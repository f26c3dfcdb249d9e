"""Pretraining on a stream: its numbers, its switches, and a run that goes on with another number of processes."""

import json
import random

import pytest
from tiny_model import losses, steps, train, tune, write_model

from ftlib import cli
from ftlib.errors import UserError

SETTINGS = {
    "stream": {"workers": 1, "buffer": 32},
    "batch": {"rows": 4, "micro_rows": 1},
    "optim": {"name": "muon", "lr": 1e-2},
    "schedule": {"name": "constant", "warmup_steps": 0},
    "checkpoint": {"every": 4},
    "steps": 8,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of colours, and `data` that reads them as a stream."""
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("web", "code")):
        dice = random.Random(number)
        rows = [" ".join(dice.choices(("red", "green", "blue"), k=dice.randint(3, 40))) for _ in range(120)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sources = [{"path": str(folder / "web.jsonl"), "weight": 3}, {"path": str(folder / "code.jsonl")}]
    return {"sources": sources, "seq_len": 64}


def test_rows_tell_sources_data_wait_and_statistics(tiny, texts, tmp_path):
    changes = {"log": {"statistics": 4}, "loss": {"z_loss": 1e-4}, "eval": {"every": 4}}
    rows = train("pretrain", "--config", tiny.config(tmp_path, **SETTINGS | changes, data=dict(texts)), "data.eval=4")
    trained = [row for row in rows if "loss" in row]
    assert trained[-1]["loss"] < 0.6 * trained[0]["loss"]
    taken = [sum(row[f"tokens/{name}"] for row in trained) for name in ("web", "code")]
    assert sum(taken) == trained[-1]["tokens"] == 8 * 4 * 64
    assert taken[0] / sum(taken) == pytest.approx(0.75, abs=0.15)
    assert all(0 <= row["data_wait"] <= 1 for row in trained)
    counted = [row["step"] for row in trained if any(key.startswith("weight_norm/") for key in row)]
    assert counted == [4, 8]
    parts = [v for k, v in trained[3].items() if k.startswith("grad_norm/")]
    assert sum(v**2 for v in parts) ** 0.5 == pytest.approx(trained[3]["grad_norm"], rel=1e-4)
    assert {"eval_loss", "eval_loss_web", "eval_loss_code"} <= rows[0].keys()


def test_a_stream_goes_on_with_two_processes_where_one_stopped(tiny, texts, tmp_path):
    """Muon's momentum and the position in the stream, saved by one process, continued by two."""
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    whole = train("pretrain", "--config", file, f"output_dir={tmp_path}/whole")
    part = train("pretrain", "--config", file, "steps=4")
    assert losses(part) == losses(whole)[:4]
    code, said, errors = tune("run", "--nproc-per-node", "2", "recipes/pretrain.py", "--config", file, "steps=8")
    assert code == 0, errors
    assert "resuming from step_000004" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps(rows) == pytest.approx(steps(whole), rel=1e-5)
    exact = [[row[k] for k in ("tokens", "tokens/web", "tokens/code")] for row in rows if "loss" in row]
    assert exact == [[row[k] for k in ("tokens", "tokens/web", "tokens/code")] for row in whole if "loss" in row]


def test_mistakes_are_found_before_anything_is_read(tiny, texts, tmp_path):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    with pytest.raises(UserError, match=r"no end(.|\n)*optim.groups\[0\].match|match(.|\n)*no end"):
        train("pretrain", "--config", file, "steps=null", 'optim.groups=[{"match": "nowhere"}]')


def validate(capsys, file, *words):
    """Exit code, output and errors of `tune validate pretrain`."""
    code = cli.main(["validate", "pretrain", "--config", str(file), *words])
    return code, *capsys.readouterr()


def test_a_share_held_out_of_a_stream_is_one_message_of_validate(tiny, texts, tmp_path, capsys):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    code, _, errors = validate(capsys, file, "data.eval=0.05")
    assert code == 2 and "a share of a stream is not known" in errors and "Traceback" not in errors


def test_a_model_that_does_not_fit_its_tokenizer_or_its_rows_is_told(tiny, texts, tmp_path, capsys):
    """Fresh embeddings with fewer rows than ids, with far more, and documents longer than the model's range."""
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    code, _, errors = validate(capsys, file, "sizes.vocab=200")
    assert code == 2 and "sizes.vocab" in errors and "set it to 259 or more" in errors
    assert validate(capsys, file, "sizes.vocab=259")[0] == 0
    code, said, errors = validate(capsys, file, "sizes.vocab=1000", "data.seq_len=1024")
    assert code == 0, errors
    assert "259 ids, the embedding 1,000 rows" in said and "sizes.vocab=259 leaves them out" in said
    assert "the model's range is 512" in said and "context.length=1024" in said


def test_another_tokenizer_on_trained_weights_is_told(tiny, texts, tmp_path, capsys):
    write_model(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    spec = json.loads(file.read_text())
    ids = spec["model"]["vocab"]
    ids["o"], ids["e"] = ids["e"], ids["o"]
    file.write_text(json.dumps(spec))
    config = tiny.config(tmp_path, **SETTINGS, data=dict(texts), from_scratch=False)
    assert "other tokens" not in validate(capsys, config)[1]
    assert "other tokens than the model's own" in validate(capsys, config, f"tokenizer.path={tmp_path}/other")[1]


def test_shares_after_the_end_of_the_run_are_told(tiny, texts, tmp_path, capsys):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    for step, told in ((8, False), (9, True)):
        _, said, errors = validate(capsys, file, f"stream.mix=[{{step: {step}, weights: {{web: 2}}}}]")
        assert ("stream.mix goes on to step 9, the run (steps) ends at 8" in said) == told and not errors
