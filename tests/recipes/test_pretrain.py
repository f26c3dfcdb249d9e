"""Pretraining on a stream: its numbers, its switches, and a run that goes on with another number of processes."""

import json
import random

import pytest
from tiny_model import ROOT, losses, steps, train, tune, write_model

from ftlib import cli, config, plugins
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


@pytest.mark.parametrize("place", ["/proc/x", "file", "file/below"])
def test_a_folder_that_cannot_be_written_is_told_before_a_shape_is(tiny, texts, tmp_path, place):
    (tmp_path / "file").touch()
    words = ["sizes.layers=1", f"output_dir={place if place[0] == '/' else tmp_path / place}"]
    with pytest.raises(UserError, match=r"cannot be written to|is a file, not a folder") as caught:
        train("pretrain", "--config", tiny.config(tmp_path, **SETTINGS, data=dict(texts)), *words)
    assert caught.value.where == "output_dir"


def test_norms_of_gradients_that_are_summed_later_are_refused(tiny, texts, tmp_path):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    with pytest.raises(UserError, match="summed in the optimizer") as caught:
        train("pretrain", "--config", file, "log.statistics=2", "deterministic=elastic")
    assert caught.value.where == "log.statistics, deterministic" and "deterministic=true" in caught.value.fix


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


def test_heads_that_keep_their_size_in_another_width_are_told(tiny, texts, tmp_path, capsys):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    told = "heads keep the published 24 channels: 2 of them, and dim is 64; sizes.head_dim sets it"
    for words in ([], ["sizes.heads=2"], ["sizes.heads=2", "sizes.head_dim=32"]):
        code, said, errors = validate(capsys, file, *words)
        assert (code, told in said) == (0, len(words) == 1), errors


@pytest.mark.parametrize("recipe", ["pretrain", "diffusion"])
def test_long_texts_are_split_unless_the_config_says_otherwise(recipe, tiny, tmp_path):
    schema = plugins.load_file(ROOT / f"recipes/{recipe}.py").Config
    words = ["--config", str(tiny.config(tmp_path))]
    assert config.load(schema, words).data.overlong == "split"
    assert config.load(schema, [*words, "data.overlong=drop"]).data.overlong == "drop"
    assert "overlong: split" in config.dump(config.load(schema, words)), "config.yaml gives the same run again"
    assert next(doc.default for doc in config.describe(schema) if doc.key == "data.overlong") == "split"


def test_no_token_of_a_long_text_is_lost_without_a_stream(tiny, tmp_path, capsys):
    rows = [json.dumps({"text": text}) for text in ("red " * 400, "blue")]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    data = {"sources": [{"path": str(tmp_path / "long.jsonl")}], "seq_len": 64}
    code, said, errors = validate(capsys, tiny.config(tmp_path, **SETTINGS | {"stream": None}, data=data))
    assert code == 0 and "1,60" in said and "split at data.seq_len=64" in said, said + errors


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


def test_the_readme_s_config_of_a_stream_is_one(tmp_path):
    text = (ROOT / "ftlib/data/README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (file := tmp_path / "my.yaml").write_text(text)
    cfg = config.load(plugins.load_file(ROOT / "recipes/pretrain.py").Config, ["--config", str(file)])
    assert all(point.weights.keys() == {source.name for source in cfg.data.sources} for point in cfg.stream.mix)
    assert cfg.data.eval == 200 and cfg.stream.mix[-1].step < cfg.steps


def test_shares_after_the_end_of_the_run_are_told(tiny, texts, tmp_path, capsys):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    for step, told in ((8, False), (9, True)):
        _, said, errors = validate(capsys, file, f"stream.mix=[{{step: {step}, weights: {{web: 2}}}}]")
        assert ("stream.mix goes on to step 9, the run (steps) ends at 8" in said) == told and not errors


def test_a_run_that_goes_on_tells_what_changed_and_refuses_another_one(tiny, texts, tmp_path, capsys):
    file = tiny.config(tmp_path, **SETTINGS, data=dict(texts))
    train("pretrain", "--config", file, "steps=2")
    capsys.readouterr()
    refused = {
        "loss.name=eaft": "loss.name: 'cross_entropy' then, 'eaft' now",
        "init.std=0.5": "init.std: None then, 0.5 now",
        "stream.buffer=64": "stream.buffer: 32 then, 64 now",
        "stream=null": "stream: {'buffer': 32,",
        "data.sources[0].name=books": "data.sources[0].name: None then, 'books' now",
        "sizes.layers=3": "sizes.layers: None then, 3 now",
        "context.ssmax=0.2": "context.ssmax: None then, 0.2 now",
        "mtp.depth=1": "mtp.depth: 0 then, 1 now",
        "optim.name=lion": "optim.name: 'muon' then, 'lion' now",
    }
    for change, named in refused.items():
        with pytest.raises(UserError) as caught:
            train("pretrain", "--config", file, change)
        assert f"    {named}" in str(caught.value), change
    changes = ["loss.z_loss=1e-3", "data.sources[0].weight=0.9", "optim.lr=2e-2", "log.every=2"]
    train("pretrain", "--config", file, "steps=3", *changes)
    told = "weight: 3.0 -> 0.9; steps: 2 -> 3; loss.z_loss: 0.0 -> 0.001; optim.lr: 0.01 -> 0.02\n"
    assert f"resuming from step_000002; config changed data.sources[0].{told}" in capsys.readouterr().out
