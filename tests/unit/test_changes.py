"""What of a config may change when a run goes on: every key of every recipe, what is refused, what is told."""

import json

import pytest
from faults.tiny_training import fresh, one_process

from ftlib import plugins
from ftlib.checkpoint import Saver
from ftlib.checkpoint.changes import LISTED, kind, noted, refused
from ftlib.cli import assets
from ftlib.config.types import known_keys
from ftlib.errors import UserError
from ftlib.sections import Checkpoint

pytestmark = pytest.mark.usefixtures("process_group")

RECIPES = {path.stem: path for path in assets.shipped("recipes").values()}


def make_saver(out, fingerprint, say=lambda text: None):
    return Saver(Checkpoint(every=2), out, one_process(), fingerprint, say=say)


def keys_of(recipe):
    """Dotted keys as `changes` lists them; none of a recipe without checkpoints."""
    keys = [key.replace("[]", "") for key in known_keys(plugins.load_file(RECIPES[recipe]).Config)]
    return keys if "checkpoint" in keys else []


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_key_says_what_becomes_of_its_change(recipe):
    """A new key fails here until somebody has decided: HELD, TOLD or SILENT in ftlib/checkpoint/changes.py."""
    keys, listed = keys_of(recipe), set().union(*LISTED.values())
    sections = {key.rpartition(".")[0] for key in keys}
    within = [key for key in keys if any(key == name or key.startswith(f"{name}.") for name in listed)]
    unlisted = sorted(set(keys) - set(within) - sections)
    assert unlisted == []


def test_the_lists_are_apart_and_name_nothing_else():
    every = {key for recipe in RECIPES for key in keys_of(recipe)}
    assert set().union(*LISTED.values()) <= every
    assert sum(map(len, LISTED.values())) == len(set().union(*LISTED.values())), "in two of the lists"


WAS = {
    "sizes": {"layers": 2},
    "data": {"sources": [{"name": "c4", "weight": 0.4, "columns": {}}], "seq_len": 8},
    "stream": {"buffer": 256, "workers": 1, "mix": []},
    "steps": 60,
    "loss": {"name": "cross_entropy", "z_loss": 0.0},
    "mtp": {"depth": 0, "weight": 0.3},
    "optim": {"name": "adamw", "lr": 0.1},
    "log": {"every": 1},
    "seed": 0,
}
HELD_THEN = {"data": "d4", "model": "c3", "data.seq_len": 8, "seed": 0}


def with_(key, value):
    """`WAS` with a key set, as in `data.sources.0.name`."""
    tree = json.loads(json.dumps(WAS))
    *path, last = key.split(".")
    place = tree
    for name in path:
        place = place[int(name) if isinstance(place, list) else name]
    place[last] = value
    return tree


@pytest.mark.parametrize(
    ("key", "value", "now", "lines"),
    [
        ("stream.buffer", 512, {"data": "e5"}, ["data: other rows than then", "stream.buffer: 256 then, 512 now"]),
        ("stream", None, {"data": "e5"},
         ["data: other rows than then", "stream: {'buffer': 256, 'workers': 1, 'mix': []} then, None now"]),
        ("data.sources.0.name", "web", {"data": "e5"},
         ["data: other rows than then", "data.sources[0].name: 'c4' then, 'web' now"]),
        ("data.sources.0.columns", {"text": "body"}, {"data": "e5"},
         ["data: other rows than then", "data.sources[0].columns: {} then, {'text': 'body'} now"]),
        ("sizes.layers", 3, {"model": "f6"},
         ["model: other weights or another config.json than then", "sizes.layers: 2 then, 3 now"]),
        ("mtp.depth", 1, {"mtp": {"depth": 1, "weight": 0.3}}, ["mtp.depth: 0 then, 1 now"]),
        ("optim.name", "lion", {}, ["optim.name: 'adamw' then, 'lion' now"]),
        ("loss.name", "eaft", {}, ["loss.name: 'cross_entropy' then, 'eaft' now"]),
        ("seed", 1, {"data": "e5", "seed": 1}, ["seed: 0 then, 1 now"]),
        ("log.every", 5, {"data": "e5"}, ["data: other rows than then (data, tokenizer)"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_names_the_key(key, value, now, lines):
    assert refused(HELD_THEN, HELD_THEN | now, WAS, with_(key, value)) == lines


def test_a_file_that_has_moved_is_told_and_another_refused():
    files = ("/a/own.py:score", "/b/c/own.py:score", "/a/own.py:other")
    was, moved, other = ({"rewards": [{"fn": file}]} for file in files)
    assert refused({}, {}, was, moved) == []
    assert noted(was, moved) == ["rewards[0].fn: '/a/own.py:score' -> '/b/c/own.py:score'"]
    assert refused({}, {}, was, other) == ["rewards[0].fn: '/a/own.py:score' then, '/a/own.py:other' now"]


def test_what_a_run_goes_on_with_is_told():
    assert noted(WAS, WAS) == [] == noted(WAS, with_("log.every", 5)) == noted(WAS, with_("stream.workers", 4))
    assert noted(WAS, with_("loss.z_loss", 1e-3)) == ["loss.z_loss: 0.0 -> 0.001"]
    assert noted(WAS, with_("data.sources.0.weight", 0.9)) == ["data.sources[0].weight: 0.4 -> 0.9"]
    assert noted(WAS, with_("stream.mix", [{"step": 4}])) == ["stream.mix: [] -> [{'step': 4}]"]
    assert [kind(key) for key in ("mine.own", "data.sources[3].path", "stream", "stream.workers")] == [
        "tell", "tell", "hold", "pass",
    ]  # fmt: skip


def test_keys_that_are_new_since_are_no_change():
    """In a config of an earlier version, and in its fingerprint."""
    old = {key: value for key, value in WAS.items() if key not in ("loss", "mtp")}
    assert refused({"seed": 0}, {"seed": 0}, old, WAS) == [] == noted(old, WAS)
    assert refused({"seed": 0}, {"seed": 0, "mtp": {"depth": 0, "weight": 0.3}}, WAS, WAS) == []
    assert refused({"seed": 0}, {"seed": 0, "lora.rank": 4}, WAS, WAS) == ["lora.rank: None then, 4 now"]


def test_a_checkpoint_without_a_config_is_compared_with_that_of_its_folder(tmp_path):
    make_saver(tmp_path, {"seed": 0}).save(1, fresh())
    (tmp_path / "config.yaml").write_text("loss: {name: cross_entropy, z_loss: 0.0}\n")
    said = []
    assert make_saver(tmp_path, {"seed": 0, "config": with_("loss.z_loss", 1e-3)}, said.append).resume(fresh()) == 1
    assert said == ["resuming from step_000001; config changed loss.z_loss: 0.0 -> 0.001"]
    with pytest.raises(UserError, match=r"other settings:\n    loss\.name: 'cross_entropy' then, 'dft' now\n"):
        make_saver(tmp_path, {"seed": 0, "config": with_("loss.name", "dft")}).resume(fresh())


def test_its_own_config_is_what_a_checkpoint_is_compared_with(tmp_path):
    """That of the folder may be of a start that never came to a save."""
    make_saver(tmp_path, {"seed": 0, "config": WAS}).save(1, fresh())
    (tmp_path / "config.yaml").write_text("loss: {name: dft}\n")
    with pytest.raises(UserError, match=r"loss\.name: 'cross_entropy' then, 'dft' now"):
        make_saver(tmp_path, {"seed": 0, "config": with_("loss.name", "dft")}).resume(fresh())


def test_other_settings_are_refused_by_name(tmp_path):
    make_saver(tmp_path, {"seed": 0, "model.path": "a", "lora.rank": 8}).save(1, fresh())
    saver = make_saver(tmp_path, {"seed": 0, "model.path": "b", "data": [1, 2]})
    with pytest.raises(UserError) as caught:
        saver.resume(fresh())
    text = str(caught.value)
    assert "model.path: 'a' then, 'b' now" in text
    assert "lora.rank: 8 then, None now" in text
    assert "resume=never" in text and "output_dir" in text and "seed" not in text
    assert make_saver(tmp_path, {"seed": 0, "lora.rank": 8, "model.path": "a"}).resume(fresh()) == 1


@pytest.mark.parametrize(
    ("changed", "listed"),
    [
        ({"seed": 1, "data": "e5"}, ["seed: 0 then, 1 now"]),
        ({"data": "e5"}, ["data: other rows than then (data, tokenizer)"]),
        ({"data.seq_len": 9, "data": "e5"}, ["data.seq_len: 8 then, 9 now"]),
        ({"batch.rows": 9, "data": "e5"}, ["batch.rows: 8 then, 9 now"]),
        ({"model": "f6", "data": "e5"}, ["data: other rows", "model: other weights"]),
    ],
    ids=str,
)
def test_only_what_the_user_changed_is_listed(tmp_path, changed, listed):
    """Which rows are held out follows from the seed, a stream's rows from those of a step; digests say nothing."""
    was = {"seed": 0, "data.seq_len": 8, "batch.rows": 8, "data": "d4", "model": "c3"}
    make_saver(tmp_path, was).save(1, fresh())
    with pytest.raises(UserError) as caught:
        make_saver(tmp_path, was | changed).resume(fresh())
    lines = [line.strip() for line in str(caught.value).splitlines() if " then" in line]
    assert len(lines) == len(listed)
    assert all(line.startswith(start) for line, start in zip(lines, listed, strict=True))
