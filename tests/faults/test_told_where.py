"""Errors that are found after a config was read still say in which line the key they name was written."""

from dataclasses import dataclass, field

import pytest
from tiny_model import write_model, write_rows

from ftlib import cli, config
from ftlib.errors import Problems, UserError, about

YAML = """\
model: {{path: {model}}}
data:
  sources:
    - path: rows.jsonl
    - path: {second}
      format: {format}
      columns: {columns}
  eval: {held_out}
  seq_len: 64
batch: {{rows: 4, micro_rows: {micro_rows}}}
steps: 1
dtype: fp32
output_dir: out
"""
GOOD = {
    "model": "model", "second": "rows.jsonl", "format": "auto", "columns": "{}", "held_out": 2, "micro_rows": 2,
}  # fmt: skip
SOURCE = "data.sources[1]"
# what is changed in the YAML, the command line, what the message says of the place
MISTAKES = {
    "file": ({"second": "rwos.jsonl"}, [], f"where: {SOURCE}.path (c.yaml:5)\n"),
    "pattern": ({"second": "'*.parquet'"}, [], f"where: {SOURCE}.path (c.yaml:5)\n"),
    "folder of something else": ({"second": "model"}, [], f"where: {SOURCE} (c.yaml:5)\n"),
    "file by override": ({}, [f"{SOURCE}.path=none.jsonl"], f"where: {SOURCE}.path (command line)\n"),
    "format": ({"format": "alpacca"}, [], f"where: {SOURCE}.format (c.yaml:6)\n"),
    "function": ({"format": "./none.py:f"}, [], f"where: {SOURCE}.format (c.yaml:6)\n"),
    "column": ({"columns": "{instruction: questoin}"}, [], f"where: {SOURCE}.columns.instruction (c.yaml:7)\n"),
    "section by override": ({}, [f"{SOURCE}.format=qa"], f"where: {SOURCE} (c.yaml:5, command line)\n"),
    "held out": ({"held_out": 99}, [], "where: data.eval (c.yaml:8)\n"),
    "held-out file": ({"held_out": "[{path: no.jsonl}]"}, [], "where: data.eval[0].path (c.yaml:8)\n"),
    "model": ({"model": "./modle"}, [], "where: model.path (c.yaml:1)\n"),
    "model by override": ({}, ["model.path=./modle"], "where: model.path (command line)\n"),
    "no weights": ({}, ["model.path=bare"], "where: model.path (command line)\n"),
    "tokenizer": ({}, ["tokenizer.path=bare"], "where: tokenizer.path (command line)\n"),
    "code": ({}, ["model.code=./none.py:Decoder"], "where: model.code (command line)\n"),
    "adapter": ({}, ["lora.start_from=bare"], "where: lora.start_from (command line)\n"),
    "template": ({}, ["data.template=chatlm"], "where: data.template (command line)\n"),
    "two keys": ({"micro_rows": 3}, ["batch.rows=7"], "batch.rows (command line), batch.micro_rows (c.yaml:10)\n"),
    "a key that nothing sets": ({}, ["checkpoint.keep_best=true"], "where: eval.every\n"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working directory with a model and rows."""
    folder = tmp_path_factory.mktemp("where")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 12)
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text((folder / "model" / "config.json").read_text())
    return folder


def told(folder, monkeypatch, capsys, verb, change, words):
    monkeypatch.chdir(folder)
    (folder / "c.yaml").write_text(YAML.format(**GOOD | change))
    assert cli.main([verb, "lora_sft", "--config", "c.yaml", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", MISTAKES)
def test_validate_says_the_line(name, here, monkeypatch, capsys):
    change, words, expected = MISTAKES[name]
    assert expected in told(here, monkeypatch, capsys, "validate", change, words) + "\n"


@pytest.mark.parametrize("verb", ["run", "preview", "prepare"])
def test_so_do_the_other_verbs(verb, here, monkeypatch, capsys):
    change, words, expected = MISTAKES["file"]
    assert expected in told(here, monkeypatch, capsys, verb, change, words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.eval=[{path: no.jsonl}]"], "where: data.eval[0].path (command line)\n"),
        (["data.sources[1].path=no.jsonl"], "where: data.sources[1].path (command line)\n"),
    ],
)
def test_a_stream_says_it_too(words, expected, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    (here / "c.yaml").write_text(YAML.format(**GOOD) + "stream: {buffer: 8}\n")
    assert cli.main(["validate", "pretrain", "--config", "c.yaml", "data.sources[0].name=a", *words]) == 2
    assert expected in capsys.readouterr().err


@dataclass(frozen=True)
class Config:
    steps: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    rows: tuple[dict[str, str], ...] = ()


def read(tmp_path, *overrides):
    (tmp_path / "a.yaml").write_text("rows:\n  - a: x\n  - {b: y}\nsizes: {wide: 1}\n")
    (tmp_path / "b.yaml").write_text("\nsizes:\n  high: 2\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    places = config.read(Config, [*files, *overrides])[1]
    return config.Places({key: place.replace(f"{tmp_path}/", "") for key, place in places.items()})


def test_places_of_every_key_that_is_set(tmp_path):
    assert read(tmp_path, "sizes.deep=3") == {
        "rows": "a.yaml:1", "rows[0]": "a.yaml:2", "rows[0].a": "a.yaml:2", "rows[1]": "a.yaml:3",
        "rows[1].b": "a.yaml:3", "sizes": "a.yaml:4, b.yaml:3, command line", "sizes.wide": "a.yaml:4",
        "sizes.high": "b.yaml:3", "sizes.deep": "command line",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("rows[0].a", "rows[0].a (a.yaml:2)"),
        ("rows[0].c, sizes.wide", "rows[0].c, sizes.wide (a.yaml:4)"),
        ("rows: ./mine.py:f", "rows (a.yaml:1): ./mine.py:f"),
        ("rows.jsonl:3", "rows.jsonl:3"),
        ("/elsewhere/rows/sizes", "/elsewhere/rows/sizes"),
        ("rows:3", "rows:3"),
        ("steps", "steps"),
    ],
)
def test_only_keys_get_a_place_and_once(where, expected, tmp_path):
    places = read(tmp_path)
    with pytest.raises(UserError) as caught, places.told(), places.told():
        raise UserError("wrong", where=where)
    assert caught.value.where == expected
    flat = [str(UserError("wrong", where=where, fix="mend: rows")), "no place: rows"]
    with pytest.raises(Problems) as found, places.told():
        raise Problems(flat)
    assert str(found.value) == f"wrong\n  where: {expected}\n  fix: mend: rows\nno place: rows"


def test_an_error_without_a_place_is_about_the_key_in_hand():
    with pytest.raises(UserError) as bare, about("a.b"):
        raise UserError("wrong")
    with pytest.raises(UserError) as placed, about("a.b"):
        raise UserError("wrong", where="a file")
    assert (bare.value.where, placed.value.where) == ("a.b", "a file")
