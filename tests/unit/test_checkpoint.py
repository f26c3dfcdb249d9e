"""Saving and resuming: bit for bit, with one process and two, sharded and whole, under changed settings."""

import json
import pickletools
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faults import two_ranks
from faults.tiny_training import Loader, fresh, one_process, train_step
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import environment
from torch import nn

from ftlib.checkpoint import Saver, State, StopFlag, publish, staging, tensors
from ftlib.checkpoint.agree import together
from ftlib.errors import UserError
from ftlib.sections import Checkpoint

pytestmark = pytest.mark.usefixtures("process_group")

TESTS = Path(__file__).parents[1]


def make_saver(out, fingerprint=None, say=lambda text: None, **cfg):
    return Saver(Checkpoint(**{"every": 2, **cfg}), out, one_process(), fingerprint or {"seed": 0}, say=say)


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_equals_never_having_stopped(tmp_path, dtype, frozen):
    state, saver = fresh(dtype, frozen), make_saver(tmp_path)
    assert saver.resume(state) == 0
    for _ in range(3):
        train_step(state)
    random.random()
    saver.save(3, state)
    ahead = [(train_step(state), random.random()) for _ in range(3)]

    torch.manual_seed(99)
    again = fresh(dtype, frozen)
    nn.init.ones_(again.model[3].weight)
    assert make_saver(tmp_path).resume(again) == 3
    assert again.extra["tokens"] == 3 * 64
    assert [(train_step(again), random.random()) for _ in range(3)] == ahead
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for mine, theirs in zip(state.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[slot], theirs[slot]) for slot in mine)


def test_saved_before_the_first_step(tmp_path):
    """A signal can come that early. Asking torch for the optimizer's state then would count as a step."""
    state = fresh()
    make_saver(tmp_path).save(0, state)
    assert not state.optimizer.state
    ahead = [train_step(state) for _ in range(2)]
    again = fresh(seed=1)
    assert make_saver(tmp_path).resume(again) == 0
    assert [train_step(again) for _ in range(2)] == ahead
    assert again.optimizer.state[again.model[0].weight]["step"] == 2


def test_only_what_is_trained_is_saved(tmp_path):
    state = fresh(frozen=True)
    train_step(state)
    make_saver(tmp_path).save(1, state)
    with safe_open(next((tmp_path / "checkpoints").rglob("shard-*")), "pt") as file:
        names = set(file.keys())
    assert not [name for name in names if ".0." in name], "frozen parameters were saved"
    assert {"model.2.running_mean", "model.3.weight", "optim.state.3.weight.exp_avg"} <= names


def test_tied_parameters_are_saved_once(tmp_path):
    def tied(frozen):
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
        model["own"] = nn.Linear(4, 4)
        model["head"].weight = model["embed"].weight
        model["embed"].weight.requires_grad_(not frozen)
        trained = [p for p in model.parameters() if p.requires_grad]
        return State(model, torch.optim.AdamW(trained), Loader())

    for frozen in (False, True):
        state = tied(frozen)
        state.model["head"](state.model["own"](torch.ones(2, 4))).sum().backward()
        state.optimizer.step()
        saved = tensors.model_tensors(state.model)
        assert [name for name in saved if "own" not in name] == ([] if frozen else ["model.embed.weight"])
        make_saver(tmp_path / str(frozen)).save(1, state)
        again = tied(frozen)
        make_saver(tmp_path / str(frozen)).resume(again)
        assert torch.equal(again.model["own"].weight, state.model["own"].weight)
        assert again.model["head"].weight is again.model["embed"].weight
        assert torch.equal(again.model["head"].weight, state.model["head"].weight)


def test_a_parameter_that_never_had_a_gradient_has_no_state_again(tmp_path):
    state = fresh()
    unused = nn.Parameter(torch.ones(3))
    state.model.register_parameter("unused", unused)
    state.optimizer.add_param_group({"params": [unused]})
    train_step(state)
    make_saver(tmp_path).save(1, state)
    again = fresh()
    again.model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    again.optimizer.add_param_group({"params": [again.model.unused]})
    make_saver(tmp_path).resume(again)
    assert again.model.unused not in again.optimizer.state
    assert torch.equal(again.model.unused, unused)


def test_several_optimizers_and_state_that_is_no_tensor(tmp_path):
    class Counting(torch.optim.SGD):
        """Keeps a number for each parameter and another among its settings."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.state[parameter]["seen"] = self.state[parameter].get("seen", 0) + 1

    def make():
        state = fresh()
        first, second = list(state.model[0].parameters()), list(state.model[3].parameters())
        counting = Counting(first, lr=0.1)
        counting.param_groups[0]["calls"] = 0
        return State(state.model, [counting, torch.optim.AdamW(second)], Loader())

    state, saver = make(), make_saver(tmp_path)
    saver.resume(state)
    for _ in range(2):
        state.model(torch.ones(4, 16)).sum().backward()
        for optimizer in state.optimizer:
            optimizer.step()
    saver.save(2, state)
    again = make()
    make_saver(tmp_path).resume(again)
    assert again.optimizer[0].state[again.model[0].weight] == {"seen": 2}
    assert again.optimizer[0].param_groups[0]["calls"] == 2
    assert again.optimizer[1].state[again.model[3].weight]["step"] == 2


def test_changed_settings_of_the_optimizer_win(tmp_path):
    state, saver = fresh(), make_saver(tmp_path)
    saver.resume(state)
    train_step(state)
    state.optimizer.param_groups[0]["lr"] = 0.5  # as a schedule does
    saver.save(1, state)
    again = fresh()
    again.optimizer.param_groups[0]["weight_decay"] = 0.25
    said = []
    make_saver(tmp_path, say=said.append).resume(again)
    group = again.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.9, 0.999))
    assert said == ["resuming from step_000001; config changed weight_decay 0.01 -> 0.25"]


def test_another_model_is_refused_by_tensor(tmp_path):
    state = fresh()
    train_step(state)
    make_saver(tmp_path).save(1, state)
    other = fresh()
    other.model[3] = nn.Linear(32, 8).bfloat16()
    other.model.append(nn.Linear(8, 8))
    other = State(other.model, torch.optim.AdamW(other.model.parameters()), Loader())
    with pytest.raises(UserError) as caught:
        make_saver(tmp_path).resume(other)
    assert "model.4.weight: not in the checkpoint" in str(caught.value)
    assert "model.3.weight: saved as torch.float32 [16, 32], now torch.bfloat16 [8, 32]" in str(caught.value)
    assert "more" in str(caught.value)


def test_never_starts_over_and_replaces(tmp_path):
    state = fresh()
    for step in (5, 6):
        make_saver(tmp_path).save(step, state)
    saver = make_saver(tmp_path, resume="never")
    assert saver.resume(fresh()) == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "kept until there is something better"
    saver.save(2, state)
    saver.save(4, state)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_retention_and_when_a_save_is_due(tmp_path):
    saver, state = make_saver(tmp_path, keep=3), fresh()
    for step in (2, 4, 6, 8, 10):
        saver.save(step, state)
    assert sorted(path.name for path in saver.root.iterdir()) == ["step_000006", "step_000008", "step_000010"]
    assert [step for step in range(1, 8) if saver.due(step, 7)] == [2, 4, 6, 7]
    assert not any(make_saver(tmp_path, every=0).due(step, 7) for step in range(8))


def test_a_finished_run_says_so(tmp_path):
    saver = make_saver(tmp_path)
    assert saver.finished() is None
    folder = staging(tmp_path / "final")
    publish(folder, tmp_path / "final")
    assert saver.finished() is None
    saver.finish(7)
    assert make_saver(tmp_path).finished() == 7
    assert make_saver(tmp_path, resume="never").finished() is None
    with pytest.raises(UserError, match="the finished run was made with other settings"):
        make_saver(tmp_path, {"seed": 1}).finished()
    (tmp_path / "final").rmdir()
    assert make_saver(tmp_path).finished() is None, "its result is gone, so it is not finished"


def test_no_pickle_in_any_file(tmp_path):
    state = fresh()
    train_step(state)
    make_saver(tmp_path).save(1, state)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        data = path.read_bytes()
        assert b"PK\x03\x04" not in data[:4] and data[:1] != b"\x80"
        with pytest.raises(Exception, match=r".*"):
            list(pickletools.genops(data))
        load_file(path) if path.suffix == ".safetensors" else json.loads(data)


def test_what_is_no_tensor_is_refused_not_pickled(tmp_path):
    class Strange(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    model = Strange(2, 2)
    state = State(model, torch.optim.AdamW(model.parameters()), Loader())
    with pytest.raises(TypeError, match="_extra_state is a dict"):
        make_saver(tmp_path).save(1, state)
    assert list((tmp_path / "checkpoints").glob("*")) == []


def test_a_large_state_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "FILE_BYTES", 1000)
    state = fresh()
    train_step(state)
    make_saver(tmp_path).save(1, state)
    assert len(list((tmp_path / "checkpoints").rglob("shard-*"))) > 3
    ahead = train_step(state)
    again = fresh(seed=1)
    assert make_saver(tmp_path).resume(again) == 1
    assert train_step(again) == ahead


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Reports of both processes, and the folder they worked in."""
    out = tmp_path_factory.mktemp("two")
    ranks = [
        subprocess.Popen(
            [sys.executable, two_ranks.__file__, str(rank), str(out / "store"), str(out)],
            env=environment(TESTS),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    return [json.loads((out / f"report_{rank}.json").read_text()) for rank in range(2)], out


def test_two_ranks_save_in_the_background(two):
    reports = [report["background"] for report in two[0]]
    assert all(report["same"] for report in reports), "the files hold what a save that is waited for writes"
    assert reports[0]["step"] == reports[1]["step"], "a failure of one rank is raised after the same step on all"
    assert all(r["error"] == "UserError: writing step_000002: No space left on device" for r in reports), reports


@pytest.mark.parametrize("kind", ["sharded", "plain", "adapter"])
def test_two_ranks_resume_and_one_rank_reads_the_same(two, kind):
    reports, out = two
    assert [report[kind]["done"] for report in reports] == [3, 3]
    assert all(report[kind]["same"] for report in reports)
    assert reports[0][kind]["random"] != reports[1][kind]["random"], "each rank has its own generator"
    folder = out / kind / "checkpoints" / "step_000003"
    state_json = json.loads((folder / "state.json").read_text())
    assert state_json["world"] == 2 and set(state_json["rng"]) == {"0", "1"}
    shards = sorted(path.name for path in folder.glob("shard-*"))
    assert shards == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]

    said = []
    state = two_ranks.network(False, frozen=kind == "adapter")
    saver = Saver(Checkpoint(every=1), out / kind, one_process(), {"seed": 0}, say=said.append)
    assert saver.resume(state) == 3
    expected, found = load_file(out / kind / "whole.safetensors"), two_ranks.whole(state)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert said[-1] == "saved by 2 processes, now 1: random generators start anew"
    first = torch.rand(3)
    make_saver(out / kind, every=1).resume(two_ranks.network(False, frozen=kind == "adapter"))
    assert torch.equal(torch.rand(3), first), "anew, but the same each time"


def test_one_failing_rank_fails_all(two):
    (first, second), _ = two
    full = "UserError: writing step_000001: No space left on device"
    assert first["failures"][:2] == second["failures"][:2] == [full, full]
    assert first["failures"][2] == second["failures"][2] == "RuntimeError: broken"
    assert second["failures"][3] == "RuntimeError: broken"
    assert first["failures"][3] == "RuntimeError: rank 1 failed while writing step_000001: RuntimeError: broken"


def test_exchange_and_stop_are_the_same_everywhere(two):
    (first, second), _ = two
    assert first["exchange"] == second["exchange"]
    assert [value["rank"] for value in first["exchange"]] == [0, 1]
    assert first["stop"] == second["stop"] == [False, True]


def test_together_keeps_what_a_user_error_says():
    with pytest.raises(UserError) as caught, together(one_process(), "testing"):
        raise UserError("a", where="b", fix="c")
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("a", "b", "c")


def test_signals_only_set_a_flag(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested and stop.by == "SIGUSR1"
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # an echo of the same request
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_flag_outside_the_main_thread():
    seen = []

    def work():
        with StopFlag() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
