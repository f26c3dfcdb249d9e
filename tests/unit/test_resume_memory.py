"""Going on holds no more gradients and optimizer state than training did, nor does saving beside it."""

from types import SimpleNamespace

import pytest
import torch
from faults.tiny_training import Loader, one_process
from tiny_model import write_model

from ftlib import models, optim
from ftlib.checkpoint import Saver, State
from ftlib.optim import lisa
from ftlib.sections import Checkpoint, Lisa, Optim

LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=LAYERS)


def begun(folder, sleeping, **settings):
    model = models.from_pretrained(folder).train()
    if sleeping:
        lisa.attach(model, SimpleNamespace(lisa=Lisa(layers=1, every=1), seed=0))
    return State(model, optim.build(model, Optim(lr=1e-2, max_grad_norm=None, **settings)), Loader())


def train(state, steps):
    for step in steps:
        lisa.at(step, state.model, state.optimizer)
        state.model.logits(torch.arange(5, 25)[None]).square().mean().backward()
        optim.step(state.optimizer, None)


def held(optimizer):
    """Numbers of gradients, and of optimizer state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for slots in optimizer.state.values() for x in slots.values() if isinstance(x, torch.Tensor)]
    return sum(p.numel() for p in parameters if p.grad is not None), sum(x.numel() for x in state)


def saver(folder, **settings):
    return Saver(Checkpoint(every=1, **settings), folder, one_process(), {"seed": 0}, say=lambda text: None)


@pytest.mark.parametrize("sleeping", [True, False], ids=["lisa", "in backward"])
def test_state_is_made_for_what_had_some_one_parameter_at_a_time(sleeping, folder, tmp_path):
    settings = {} if sleeping else {"in_backward": True}
    state = begun(folder, sleeping, **settings)
    train(state, range(1, 4))
    saver(tmp_path).save(3, state)
    again, most = begun(folder, sleeping, **settings), [(0, 0)]
    train(again, range(1, 3))  # it goes back to the other's third step
    plain = again.optimizer.step

    def step(*args, **options):
        plain(*args, **options)
        most.append(held(again.optimizer))

    again.optimizer.step = step
    assert saver(tmp_path).resume(again) == 3
    again.optimizer.step = plain
    assert max(grads for grads, _ in most) <= max(p.numel() for p in again.model.parameters())
    assert held(again.optimizer) == (0, held(state.optimizer)[1]) == (0, max(kept for _, kept in most))
    train(state, range(4, 6)), train(again, range(4, 6))
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), again.model.parameters(), strict=True))


def test_saving_in_the_background_forgets_what_is_no_longer_there(folder, tmp_path):
    state, kept = begun(folder, sleeping=True), []
    going = saver(tmp_path, background=True)
    for step in range(1, 7):
        train(state, [step])
        going.save(step, state)
        going.wait()
        kept.append(sum(x.numel() for x in going._background._host.values()))
    assert max(kept) - min(kept) < 100, "one layer's moments at a time"
