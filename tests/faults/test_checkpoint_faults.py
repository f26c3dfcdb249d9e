"""Kills, signals and failing system calls: a good checkpoint always remains and the run goes on bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faults.tiny_training import fresh, one_process, train_step
from tiny_model import environment

from ftlib.checkpoint import Saver, StopFlag, exchange, newest_good, stop_agreed, together, verify
from ftlib.checkpoint.format import remove
from ftlib.errors import UserError
from ftlib.sections import Checkpoint

pytestmark = pytest.mark.usefixtures("process_group")

PROGRAM = Path(__file__).with_name("tiny_training.py")
STEPS = 40


def start(out, steps=STEPS, every=1, pause=0.0):
    command = [sys.executable, str(PROGRAM), str(out), str(steps), str(every), str(pause)]
    env = environment(PROGRAM.parents[1])
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_row(child, out, more=1):
    """Until the child has written `more` rows; on resuming it first drops some, so count only upwards."""
    seen, low = 0, lines(out)
    while child.poll() is None and seen < more:
        now = lines(out)
        seen, low = seen + max(0, now - low), now
        time.sleep(0.002)


def result(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exact = [(r["step"], r["loss"], r["grad_norm"]) for r in rows]
    return exact, (out / "final" / "weights.sha256").read_text()


def finish(out, steps=STEPS):
    child = start(out, steps)
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(out)
    return result(out)


@pytest.mark.slow
def test_killed_again_and_again(uninterrupted, tmp_path):
    """Last result (2026-11-22): passed."""
    out, dice, kills = tmp_path, random.Random(11), 0
    while kills < 3:  # twenty: tests/faults/test_resume.py, slow
        child = start(out)
        wait_for_row(child, out, more=dice.randint(2, 4))  # one of them was saved
        time.sleep(dice.uniform(0.0, 0.15))
        assert child.poll() is None, f"ended before kill {kills + 1}: {child.communicate()}"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
    assert "resuming from" in finish(out)
    assert result(out) == uninterrupted
    assert "already finished" in finish(out)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_signal_saves_and_the_same_command_goes_on(uninterrupted, tmp_path, number):
    child = start(tmp_path, every=1000, pause=0.25)
    wait_for_row(child, tmp_path)
    named = rf"using this folder: process {child.pid} on (\S+)\n.*\n  fix: wait .* stop it \(on \1: kill {child.pid},"
    with pytest.raises(UserError, match=named):
        Saver(Checkpoint(), tmp_path, one_process(), {"seed": 0}).resume(fresh())
    child.send_signal(number)
    said, errors = child.communicate(timeout=60)
    assert child.returncode == 75, errors
    assert number.name in said
    assert verify(next((tmp_path / "checkpoints").iterdir())) is None
    if number == signal.SIGTERM:
        assert "resuming from" in finish(tmp_path)
        assert result(tmp_path) == uninterrupted


class Killed(BaseException):
    """Nothing catches it: what a kill looks like from inside."""


def break_calls(monkeypatch, index, forever):
    """Make system call number `index` of save fail: once with an error, or for ever as if the process were gone."""
    count = 0

    def guarded(call):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count - 1 == index or (forever and count - 1 > index):
                raise Killed if forever else OSError(5, "Input/output error", str(args[0]))
            return call(*args, **kwargs)

        return run

    for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    return lambda: count > index


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step saved before"])
@pytest.mark.parametrize("forever", [False, True], ids=["fails once", "killed"])
def test_every_system_call_may_fail(tmp_path, again, forever):
    """Whatever call fails, a whole checkpoint is there and training goes on from it with the same numbers."""
    run, cfg = one_process(), Checkpoint(keep=1)
    state, saver = fresh(), Saver(cfg, tmp_path / "base", run, {"seed": 0})
    saver.resume(state)
    expected = [train_step(state) for _ in range(2)]
    saver.save(2, state)
    expected += [train_step(state) for _ in range(2)]
    index, hit = 0, True
    while hit:
        out = tmp_path / f"call_{index}"
        shutil.copytree(tmp_path / "base", out)
        state, saver = fresh(), Saver(cfg, out, run, {"seed": 0}, say=lambda text: None)
        assert saver.resume(state) == 2
        step = 2
        if not again:
            assert train_step(state) == expected[2]
            step = 3
        with pytest.MonkeyPatch.context() as patch:
            broke = break_calls(patch, index, forever)
            try:
                saver.save(step, state)
            except (Exception, Killed):  # what matters is what is left
                pass
            hit = broke()
        continued, saver = fresh(seed=5), Saver(cfg, out, run, {"seed": 0}, say=lambda text: None)
        done = saver.resume(continued)
        assert done in (2, step)
        assert [train_step(continued) for _ in range(4 - done)] == expected[done:]
        left = {path.name for path in (out / "checkpoints").iterdir()}
        assert not [name for name in left if name.startswith(".")], f"call {index} left {left}"
        saver.save(4, continued)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
        index += 1
    assert index > 8, "the patch hit fewer calls than a save makes"


def saved_three(out, keep=3):
    state, saver = fresh(), Saver(Checkpoint(keep=keep), out, one_process(), {"seed": 0})
    saver.resume(state)
    for step in (1, 2, 3):
        train_step(state)
        saver.save(step, state)
    return out / "checkpoints"


def flip_bit(folder):
    shard = next(folder.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def truncate(folder):
    shard = next(folder.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size - 1)


def link_shard(folder):
    shard = next(folder.glob("shard-*"))
    moved = shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(moved)


def edit_manifest(change):
    def damage(folder):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        change(manifest)
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))

    return damage


DAMAGE = {
    "checksum mismatch": flip_bit,
    "bytes, not": truncate,
    "is missing": lambda folder: next(folder.glob("shard-*")).unlink(),
    "MANIFEST.json is missing": lambda folder: (folder / "MANIFEST.json").unlink(),
    "is no JSON": lambda folder: (folder / "MANIFEST.json").write_text(""),
    "is no JSON (": lambda folder: (folder / "MANIFEST.json").write_text('{"format": 1,'),
    "lists no files": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "not in the manifest": lambda folder: shutil.copy(next(folder.glob("shard-*")), folder / "zz.safetensors"),
    "state.json checksum": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 3', '"step": 9')
    ),
    "no plain file name": edit_manifest(lambda m: m["files"].update({"../../outside": [1, "00"]})),
    "no plain file name ": edit_manifest(lambda m: m["files"].update({"/etc/passwd": [1, "00"]})),
    "no size and checksum": edit_manifest(lambda m: m["files"].update({"x": "y"})),
    "format 99": edit_manifest(lambda m: m.update(format=99)),
    "shard-00001-model-00001-of-00001.safetensors is missing": link_shard,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_checkpoint_is_passed_over(tmp_path, reason):
    root = saved_three(tmp_path)
    DAMAGE[reason](root / "step_000003")
    said = []
    state, saver = fresh(), Saver(Checkpoint(keep=1), tmp_path, one_process(), {"seed": 0}, say=said.append)
    assert saver.resume(state) == 2
    assert said[0].startswith("skip step_000003: ")
    assert reason.strip(" (") in said[0]
    train_step(state)
    saver.save(3, state)  # the same step again: the damaged one gives way, and is not counted among those kept
    assert [path.name for path in root.iterdir() if path.is_dir()] == ["step_000003"]
    assert verify(root / "step_000003") is None


def test_all_damaged_is_an_error_with_every_reason(tmp_path):
    root = saved_three(tmp_path)
    flip_bit(root / "step_000003")
    truncate(root / "step_000002")
    (root / "step_000001" / "MANIFEST.json").write_text("")
    for resume in ("auto", "required"):
        saver = Saver(Checkpoint(resume=resume), tmp_path, one_process(), {"seed": 0}, say=lambda text: None)
        with pytest.raises(UserError) as caught:
            saver.resume(fresh())
        for text in ("step_000003: shard-", "checksum", "step_000002: shard-", "bytes, not", "step_000001: MANIFEST"):
            assert text in str(caught.value)
        assert "checkpoint.resume=never" in caught.value.fix
    assert len(list(root.iterdir())) == 3, "nothing was thrown away"


def test_a_damaged_later_step_does_not_push_out_good_ones(tmp_path):
    root = saved_three(tmp_path)
    flip_bit(root / "step_000003")
    state, saver = fresh(), Saver(Checkpoint(keep=2), tmp_path, one_process(), {"seed": 0}, say=lambda text: None)
    assert saver.resume(state) == 2
    flip = root / "step_000007"  # from somewhere else, newer than anything of this run
    shutil.copytree(root / "step_000003", flip)
    train_step(state)
    saver.save(5, state)
    assert sorted(path.name for path in root.iterdir()) == ["step_000002", "step_000005"]


def test_names_that_are_not_ours_stay(tmp_path):
    root = saved_three(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    for name in ("step_000009", ".tmp_step_000009", ".del_step_000001"):
        (root / name).symlink_to(outside, target_is_directory=True)
    others = ["step_abc", "step_1.bak", "my step_1", ".tmp_step_", ".del_notes", "step_٣"]
    for name in others:
        (root / name).mkdir()
    state, saver = fresh(), Saver(Checkpoint(keep=1), tmp_path, one_process(), {"seed": 0}, say=lambda text: None)
    assert saver.resume(state) == 3
    saver.save(4, state)
    assert (outside / "precious").exists()
    # The link is where step_000001 would be moved to before it is deleted, so that one stays too.
    assert {*others, "step_000009", ".tmp_step_000009", ".del_step_000001", "step_000001", "step_000004"} == {
        path.name for path in root.iterdir()
    }
    for path in (outside, root / "step_000009", root / "step_abc", root / ".del_notes"):
        with pytest.raises(ValueError, match="refusing to delete"):
            remove(path)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    root = saved_three(tmp_path)
    before = sorted(root.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 2**19))
    saver = Saver(Checkpoint(), tmp_path, one_process(), {"seed": 0})
    with pytest.raises(UserError, match=r"no room for step_000004: it needs [0-9.]+ GiB"):
        saver.save(4, fresh())
    assert sorted(root.rglob("*")) == before
    assert newest_good(root, print) == ("step_000003", [])


def test_disk_full_while_writing(tmp_path, monkeypatch):
    root = saved_three(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    saver = Saver(Checkpoint(), tmp_path, one_process(), {"seed": 0})
    with pytest.raises(UserError, match="writing step_000004: No space left on device"):
        saver.save(4, fresh())
    assert sorted(path.name for path in root.iterdir()) == ["step_000001", "step_000002", "step_000003"]


def test_killed_before_the_first_checkpoint_starts_afresh(tmp_path):
    partial = tmp_path / "checkpoints" / ".tmp_step_000001"
    partial.mkdir(parents=True)
    (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    saver = Saver(Checkpoint(), tmp_path, one_process(), {"seed": 0})
    assert saver.resume(fresh()) == 0
    assert not partial.exists()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        Saver(Checkpoint(resume="required"), tmp_path, one_process(), {"seed": 0}).resume(fresh())


def test_a_failed_save_does_not_change_what_is_trained(tmp_path, monkeypatch):
    state, twin = fresh(), fresh()
    torch.manual_seed(3)
    expected = [train_step(twin) for _ in range(3)]
    torch.manual_seed(3)
    found = [train_step(state)]
    with monkeypatch.context() as patch, pytest.raises(UserError):
        break_calls(patch, 0, forever=False)
        Saver(Checkpoint(), tmp_path, one_process(), {"seed": 0}).save(1, state)
    assert found + [train_step(state) for _ in range(2)] == expected


def test_one_process_agrees_with_itself_without_a_collective(monkeypatch):
    """A refusal just after one aborted one run in four: a thread of gloo's met an interpreter that had begun to end."""
    run, flag = one_process(), StopFlag()
    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("a collective"))
    assert exchange(run, {"a": (1, "ü")}) == [{"a": [1, "ü"]}], "as JSON has it"
    assert not stop_agreed(run, flag)
    flag.requested = True
    assert stop_agreed(run, flag)
    with pytest.raises(UserError, match="writing: Permission denied"), together(run, "writing"):
        raise PermissionError(13, "Permission denied")


def test_a_folder_of_another_recipe_s_run_is_told_whose_it_is(tmp_path):
    run, cfg = one_process(), Checkpoint(every=1)
    Saver(cfg, tmp_path, run, {"seed": 0, "lora.rank": 4}).save(1, fresh())
    (tmp_path / "config.yaml").write_text("model: {path: x}\nrelora: {every: 2}\n")
    with pytest.raises(UserError, match="made with other settings, by recipes/lora_sft") as error:
        Saver(cfg, tmp_path, run, {"seed": 0, "dpo.loss": "ipo"}).resume(fresh())
    assert "dpo.loss: None then, 'ipo' now" in str(error.value)
    with pytest.raises(UserError, match="made with other settings:"):
        Saver(cfg, tmp_path, run, {"seed": 0, "lora.rank": 4, "context.skip": True}).resume(fresh())
