"""Saving while training goes on: the same bytes, of the moment that was saved, and no failure unheard."""

import json
import threading

import pytest
import torch
from faults.tiny_training import fresh, one_process, train_step

from ftlib.checkpoint import Saver, tensors, verify
from ftlib.errors import UserError
from ftlib.sections import Checkpoint

pytestmark = pytest.mark.usefixtures("process_group")


def make(out, background=True, **cfg):
    return Saver(Checkpoint(background=background, **cfg), out, one_process(), {"seed": 0}, say=lambda text: None)


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this event is set."""
    gate, write = threading.Event(), tensors.write

    def slow(*args):
        assert gate.wait(60)
        write(*args)

    monkeypatch.setattr(tensors, "write", slow)
    return gate


def files(folder):
    """Contents of a checkpoint; the header of a shard as JSON, whose order safetensors leaves to chance."""
    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            data = (json.loads(data[8:end]), data[end:].hex())
        found[path.name] = data
    return found


def test_the_same_bytes_of_the_moment_that_was_saved(tmp_path, held):
    state = fresh()
    train_step(state)
    held.set()
    make(tmp_path / "now", background=False).save(1, state)
    held.clear()
    saver = make(tmp_path / "later")
    saver.save(1, state)
    for _ in range(3):
        train_step(state)  # parameters, moments, counters, generators and the data all move on
    assert not (tmp_path / "later/checkpoints/step_000001").exists()
    held.set()
    saver.wait()
    later, now = (files(tmp_path / name / "checkpoints/step_000001") for name in ("later", "now"))
    assert later.pop("MANIFEST.json") and now.pop("MANIFEST.json") and verify(saver.root / "step_000001") is None
    assert later == now
    again = fresh(seed=3)
    assert make(tmp_path / "later").resume(again) == 1 and again.extra["tokens"] == 64


def test_one_at_a_time_and_older_ones_go_when_the_next_is_there(tmp_path, held):
    state, saver = fresh(), make(tmp_path, keep=1)
    held.set()
    saver.save(1, state)
    saver.wait()
    held.clear()
    saver.save(2, state)
    assert [path.name for path in saver.root.glob("step_*")] == ["step_000001"]
    threading.Timer(0.2, held.set).start()
    saver.save(3, state)
    assert verify(saver.root / "step_000002") is None, "the second save waits for the first"
    saver.finish(3)
    assert [path.name for path in saver.root.iterdir()] == ["step_000003"]


def test_a_failure_is_raised_after_a_later_step_and_leaves_what_was_there(tmp_path, monkeypatch):
    state, saver = fresh(), make(tmp_path, every=2)
    saver.save(2, state)
    saver.wait()
    monkeypatch.setattr(tensors, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    saver.save(4, state)
    saver._background._thread.join()
    with pytest.raises(UserError, match="writing step_000004: No space left on device"):
        saver.due(5, 9)
    assert not saver.due(5, 9), "raised once"
    assert [path.name for path in saver.root.iterdir()] == ["step_000002"]


def test_going_back_waits_for_the_save(tmp_path, held):
    state, saver = fresh(), make(tmp_path)
    train_step(state)
    saver.save(1, state)
    before = state.model[0].weight.detach().clone()
    train_step(state)
    threading.Timer(0.2, held.set).start()
    assert saver.roll_back(state) == 1
    assert torch.equal(state.model[0].weight, before)


def test_a_second_save_takes_the_same_memory_and_has_its_own_moment(tmp_path):
    state, saver = fresh(), make(tmp_path)
    train_step(state)
    saver.save(1, state)
    saver.wait()
    kept = {name: x.data_ptr() for name, x in saver._background._host.items()}
    train_step(state)
    saver.save(2, state)
    saver.wait()
    assert kept == {name: x.data_ptr() for name, x in saver._background._host.items()} and "model.0.weight" in kept
    again = fresh(seed=3)
    assert make(tmp_path).resume(again) == 2 and torch.equal(again.model[0].weight, state.model[0].weight)
