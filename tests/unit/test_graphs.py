"""Recorded passes: the same gradients as without, whoever adds them up, and what is not recorded.

A CPU has no graphs; a stand-in runs the function again where a graph would be replayed, into the same tensors.
"""

from types import SimpleNamespace

import pytest
import torch
from parity.shrink import shrunk

from ftlib.errors import Problems, UserError
from ftlib.layers.batch import Batch, Layout
from ftlib.models import LanguageModel, families
from ftlib.parallel import graphs
from ftlib.sections import Lora, Loss, Memory, Optim, Qat

ROWS, LENGTH = 2, 24


class Rerun:
    """Records nothing: replays by calling."""

    def __init__(self):
        self.calls = self.warmed = 0

    def __call__(self, *functions):
        def replaying(function):
            def replay():
                self.calls += 1
                with torch.enable_grad():
                    function()

            return replay

        return [replaying(function) for function in functions]

    def warm(self, function):
        self.warmed += 1
        function()


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = shrunk("qwen3-0.6b", vocab_size=64)
    arch, table = families.read(settings)
    built = LanguageModel(arch, table, settings).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return built


def batch(seed, extent=(ROWS, LENGTH)):
    ids = torch.randint(64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    ends = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    extent = None if extent is None else torch.tensor(extent, dtype=torch.int32)
    return Batch(ids, ids, positions, Layout.packed(ends, LENGTH, (ROWS, LENGTH), extent), ids.numel())


def gradients(model, seeds):
    """Of the sum over these batches, each a micro-batch; hidden states of each."""
    model.zero_grad(set_to_none=True)
    found = []
    for seed in seeds:
        hidden = model(batch(seed))
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).pow(2).sum().backward()
        found.append(hidden.detach().clone())
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(first, second):
    (hidden, grads), (others, other_grads) = first, second
    assert all(torch.equal(a, b) for a, b in zip(hidden, others, strict=True))
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-12, atol=1e-12)


def attached(model):
    model.model.blocks = graphs.Blocks(model.model, Rerun())
    return model.model.blocks


@pytest.mark.parametrize("frozen", [False, True], ids=["every weight", "frozen embedding"])
def test_micro_batches_and_steps_add_up_as_without(model, frozen):
    model.requires_grad_(True)
    if frozen:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    steps = ([1], [2, 3, 4], [5])
    plain = [gradients(model, seeds) for seeds in steps]
    blocks = attached(model)
    for seeds, expected in zip(steps, plain, strict=True):
        equal(gradients(model, seeds), expected)
    assert blocks.record.calls == 2 * 5 and len(blocks.passes) == 1, "every pass was a replay of one pair"


def test_an_optimizer_may_keep_gradients_or_write_over_them(model):
    expected = gradients(model, [2])
    attached(model)
    gradients(model, [1])
    model.zero_grad(set_to_none=False)
    hidden = model(batch(2))
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).pow(2).sum().backward()
    equal(([hidden.detach()], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


def test_a_pass_before_the_last_ones_backward_is_not_replayed(model):
    expected = gradients(model, [1])[1], gradients(model, [2])[1]
    blocks = attached(model)
    model.zero_grad(set_to_none=True)
    first, second = model(batch(1)), model(batch(2))
    assert blocks.record.calls == 1
    weights = torch.linspace(-1, 1, first.shape[-1])
    ((first * weights).pow(2).sum() + (second * weights).pow(2).sum()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[0][name] + expected[1][name])
    model(batch(3))
    assert blocks.record.calls == 3, "backward has been: replayed again"
    model(batch(3))
    assert blocks.record.calls == 4, "a pass that nobody holds any more waits for nothing"


def test_without_gradients_and_for_other_layouts_nothing_is_replayed(model):
    blocks = attached(model)
    with torch.no_grad():
        model(batch(1))
    other = batch(1)
    other.layout = type("Other", (Layout,), {})(**vars(other.layout))
    model(other)
    assert not blocks.passes


def test_bounds_are_few_and_hold_what_the_batch_has():
    ends = torch.zeros(101, dtype=torch.int32)
    for documents, longest, expected in ((1, 1, (32, 128)), (33, 129, (64, 256)), (99, 3000, (100, 3072))):
        layout = Layout.packed(ends, 3072, (4, 3072), torch.tensor([documents, longest], dtype=torch.int32))
        assert tuple(graphs.bounds(layout, "varlen").tolist()) == expected
        assert tuple(graphs.bounds(layout, "flash4").tolist()) == (100, 3072), "one for all: it is told by cu_seqlens"
    assert graphs.bounds(Layout.packed(ends, 3072, (4, 3072)), "varlen") is None


def test_only_so_many_pairs_are_kept(model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    monkeypatch.setattr(graphs, "LONGEST", 8)
    model.model.backend = "varlen"
    expected = gradients(model, [1])
    blocks = attached(model)
    model(batch(0, (ROWS, 3)))
    equal(gradients(model, [1]), expected)
    assert len(blocks.passes) == 1 and blocks.record.calls == 1


def test_pairs_of_one_shape_share_what_they_read_and_write(model, monkeypatch):
    """A second pair in the middle of a step neither warms up again nor touches what was added up so far."""
    monkeypatch.setattr(graphs, "LONGEST", 8)
    model.model.backend = "varlen"
    expected = gradients(model, [1, 2, 3])
    blocks = attached(model)
    plain = graphs.bounds
    rounded = iter(((ROWS, 8), (ROWS, 24), (ROWS, 8)))
    monkeypatch.setattr(graphs, "bounds", lambda *args: plain(*args).copy_(torch.tensor(next(rounded))))
    equal(gradients(model, [1, 2, 3]), expected)
    assert len(blocks.passes) == 2 and len(blocks.places) == 1 and blocks.record.warmed == 1


def test_a_weight_that_no_pass_uses_keeps_no_gradient(model):
    model.model.layers[0].unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    expected = gradients(model, [1, 2])
    attached(model)
    equal(gradients(model, [1, 2]), expected)
    assert model.model.layers[0].unused.grad is None


def test_gradients_that_others_put_there_are_added_to(model):
    """Of a pass that was not replayed, or of terms beside the loss."""
    expected = gradients(model, [1, 2])
    attached(model)
    first = gradients(model, [1])
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    hidden = model(batch(2))
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).pow(2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    equal(([*first[0], hidden.detach()], found), expected)


def config(**changes):
    base = {"memory": Memory(cuda_graph=True), "lora": Lora(), "optim": Optim(lr=1e-3), "loss": Loss(), "qat": None}
    base["model"] = SimpleNamespace(code=None)
    return SimpleNamespace(**base | changes)


def test_what_cannot_be_recorded_is_refused(monkeypatch, model):
    with pytest.raises(Problems, match=r"no GPU here(.|\n)*memory\.cuda_graph"):
        graphs.check(config(), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    graphs.check(config(), 1)
    graphs.check(config(memory=Memory(), lora=Lora(dropout=0.1)), 4)
    for wrong, words in (
        ({"lora": Lora(dropout=0.1)}, "lora.dropout"),
        ({"qat": Qat(scheme="int4")}, "qat"),
        ({"optim": Optim(lr=1e-3, in_backward=True)}, "optim.in_backward"),
        ({"memory": Memory(cuda_graph=True, offload=True)}, "memory.offload"),
        ({"memory": Memory(cuda_graph=True, budget_gib=24.0)}, "memory.budget_gib"),
        ({"deterministic": "elastic"}, "deterministic"),
        ({"profile": True}, "profile"),
        ({"model": SimpleNamespace(code="mine.py:Mine")}, "model.code"),
    ):
        with pytest.raises(Problems, match=words):
            graphs.check(config(**wrong), 1)
    with pytest.raises(Problems, match="several"):
        graphs.check(config(), 2)
    with pytest.raises(UserError, match="attention by masks"):
        graphs.attach(model)


def test_a_model_whose_blocks_do_not_train_runs_as_it_is(model):
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    blocks = attached(model)
    model(batch(1))
    assert not blocks.passes
