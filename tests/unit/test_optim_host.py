"""State of an optimizer in host memory: the same bits as on the device, in a run, in backward and after a resume."""

import pytest
import torch
from faults.tiny_training import Loader, one_process
from torch import nn

from ftlib import optim
from ftlib.checkpoint import Saver, State
from ftlib.observe import profile
from ftlib.optim.host import HostState
from ftlib.sections import Checkpoint, Optim
from ftlib.sections.optim import HOST

KINDS = [
    *(({"name": name}, torch.float32) for name in HOST),
    ({"states": "fp32"}, torch.bfloat16),
    ({"states": "int8", "rounding": "stochastic"}, torch.bfloat16),
    ({"max_grad_norm": None, "in_backward": True}, torch.float32),
]


class Net(nn.Module):
    """The layer in the middle, whose bias is the last to be stepped, is left out of some steps."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.middle = nn.Linear(448, 10), nn.Linear(10, 4), nn.Linear(10, 10)
        self.to(dtype)

    def forward(self, x, whole):
        x = torch.tanh(self.first(x))
        return self.last(self.middle(x) if whole else x)


def fresh(settings, dtype, offload):
    model = Net(dtype)
    return State(model, optim.build(model, Optim(lr=1e-2, weight_decay=0.1, offload=offload, **settings)), Loader())


def train(state, first, last):
    for step in range(first, last):
        optim.set_rate(state.optimizer, 1e-2 / (step + 1))
        x = torch.randn(8, 448, generator=torch.Generator().manual_seed(step)).to(state.model.last.weight.dtype)
        state.model(x, whole=step % 3 != 1).square().mean().backward()
        optim.step(state.optimizer, None)


def same(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        found, wanted = one.optimizer.state[a], other.optimizer.state[b]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(torch.as_tensor(found[slot]), torch.as_tensor(wanted[slot])) for slot in wanted)


@pytest.mark.parametrize(("settings", "dtype"), KINDS, ids=str)
def test_the_bits_are_those_of_state_on_the_device(settings, dtype, tmp_path):
    """With parameters that a step leaves out; saved here and continued there, both ways."""
    here, there = (fresh(settings, dtype, offload) for offload in (False, True))
    for state in (here, there):
        train(state, 0, 5)
    same(there, here)
    assert not there.optimizer.host._leaving and not there.optimizer.host._ahead  # nothing stays between steps
    Saver(Checkpoint(every=1), tmp_path, one_process(), {}).save(5, there)
    for state in (here, there):
        train(state, 5, 8)
    for offload in (False, True):
        again = fresh(settings, dtype, offload)
        assert Saver(Checkpoint(every=1), tmp_path, one_process(), {}, say=lambda text: None).resume(again) == 5
        train(again, 5, 8)
        same(again, here)


def places(state):
    """Where the tensors of each parameter's state lie."""
    return {p: {slots[name].data_ptr() for name in ("exp_avg", "exp_avg_sq")} for p, slots in
            state.optimizer.state.items()}  # fmt: skip


def test_the_next_is_fetched_while_one_is_stepped_and_nothing_stays():
    """The order is learnt in the first step; three parameters' state is here at the most."""
    state = fresh({}, torch.float32, True)
    train(state, 2, 4)
    host, seen = state.optimizer.host, []
    update, kept = state.optimizer.update, places(state)

    def watched(group):
        p = group["params"][0]
        seen.append((p, list(host._ahead), len(host._leaving)))
        assert not kept[p] & places(state)[p]  # what is stepped is not what is kept
        update(group)

    state.optimizer.update = watched
    train(state, 5, 6)
    order = [p for p, _, _ in seen]
    assert len(order) == 6 and [ahead for _, ahead, _ in seen] == [[p] for p in order[1:]] + [[]]
    assert [leaving for _, _, leaving in seen] == [0, 1, 1, 1, 1, 1]
    assert not host._ahead and not host._leaving and places(state) == kept


def test_state_that_is_given_up_begins_anew():
    """As layers that sleep do (ftlib.optim.lisa)."""
    here, there = (fresh({}, torch.float32, offload) for offload in (False, True))
    for state in (here, there):
        train(state, 0, 4)
        for p in (state.model.first.weight, state.model.middle.bias):
            del state.optimizer.state[p]
        train(state, 4, 7)
    same(there, here)


def test_a_checkpoint_waits_for_what_is_under_way(tmp_path, monkeypatch):
    state, waited = fresh({}, torch.float32, True), []
    train(state, 0, 1)
    p = state.model.first.weight
    monkeypatch.setattr(HostState, "wait", lambda self: waited.append(state.optimizer.state[p]["exp_avg"].fill_(7)))
    Saver(Checkpoint(every=1), tmp_path, one_process(), {}).save(1, state)
    monkeypatch.undo()
    again = fresh({}, torch.float32, True)
    Saver(Checkpoint(every=1), tmp_path, one_process(), {}, say=lambda text: None).resume(again)
    assert waited and (again.optimizer.state[again.model.first.weight]["exp_avg"] == 7).all()


def test_a_profile_does_not_count_it_as_memory_of_the_gpu():
    model = nn.Linear(4, 4, bias=False, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"exp_avg": torch.zeros(4 << 20), "exp_avg_sq": torch.zeros(4, 4, device="meta")}
    assert profile.memory(model, optimizer, None)["optimizer state"] == 0.0


@pytest.mark.parametrize("name", ["muon", "dion", "adafactor", "schedule_free"])
def test_what_looks_at_more_than_one_parameter_at_a_time_is_refused(name):
    with pytest.raises(ValueError, match="offload: is for adamw, lion, ademamix"):
        Optim(name=name, offload=True)
