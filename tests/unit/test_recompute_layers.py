"""Blocks that keep more for backward than others: what each keeps, to how many a budget gives it, what is told."""

import json
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_budget import NAMES, name
from test_recompute_kept import built
from tiny_model import ROOT

from ftlib import budget, preflight
from ftlib.errors import UserError
from ftlib.layers.batch import Batch, Layout
from ftlib.models import load
from ftlib.parallel import offload, recompute
from ftlib.sections import Memory

CPU, BLOCKS, ROWS, LENGTH = torch.device("cpu"), 3, 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = json.loads((ROOT / "tests/parity/configs/qwen3-0.6b.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "vocab_size": 64, "head_dim": 16}
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(config | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    return made


def stepped(model, memory):
    """(numbers that each block keeps for backward, gradients) under a setting."""
    model.model.use_attention("sdpa")
    recompute.use(model, memory, CPU)
    ends = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    layout = Layout.packed(ends, LENGTH, (ROWS, LENGTH))
    batch, kept = Batch(ids, ids, torch.arange(LENGTH).expand(ROWS, LENGTH), layout, ids.numel()), []

    def saving():
        own = []
        kept.append(own)
        return torch.autograd.graph.saved_tensors_hooks(lambda x: (own.append(x.numel()), x)[1], lambda x: x)

    model.model.saving = saving
    model.zero_grad()
    model(batch).square().sum().backward()
    return [sum(own) for own in kept], [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("lean", "rest", "adapters"),
    [("full", "none", True), ("except_attention", "selective", True), ("except_attention", "selective", False),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("full", "selective", True), ("except_attention", "none", True), ("selective", "none", True),
         ("full", "except_attention", False), ("full", "none", False)))],
)  # fmt: skip
def test_each_block_keeps_what_its_setting_says(lean, rest, adapters, folder, monkeypatch):
    """Whoever is compiled first decides nothing for the others: a block keeps what it would among its like."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    monkeypatch.setattr(recompute, "BACKEND", "aot_eager_decomp_partition")
    recompute._partitioned.cache_clear()
    settings = {"recompute": lean}, {"recompute": rest}, {"recompute": lean, "recompute_rest": rest}
    found = []
    with torch._functorch.config.patch(activation_memory_budget=1.0, aggressive_recomputation=False):
        for setting, count in zip(settings, (0, 0, 1), strict=True):
            torch._dynamo.reset()
            found.append(stepped(built(folder, adapters), Memory(compile=True, recompute_layers=count, **setting)))
    recompute._partitioned.cache_clear()
    (less, gradients), (more, others), (kept, ours) = found
    assert kept == [less[0], *more[1:]] and all(a < b for a, b in zip(less, more, strict=True))
    torch.testing.assert_close(others, gradients)
    torch.testing.assert_close(ours, gradients)


def test_without_a_compiler_the_first_blocks_are_computed_again(folder):
    model = built(folder, True)
    whole, gradients = stepped(model, Memory(recompute="none"))
    for count, flags in ((1, [True, False, False]), (2, [True, True, False]), (0, [True] * 3)):
        kept, found = stepped(model, Memory(recompute="full", recompute_layers=count))
        assert [block.recompute for block in model.model.layers] == flags
        assert [a < b for a, b in zip(kept, whole, strict=True)] == flags
        torch.testing.assert_close(found, gradients)
    stepped(model, Memory(recompute="full", recompute_layers=2, recompute_rest="selective"))
    assert [block.recompute for block in model.model.layers] == [True, True, True], "the third of every other one"


def test_blocks_that_keep_more_do_not_wait_in_host_memory(folder, monkeypatch):
    model, inside = built(folder, True), []
    monkeypatch.setattr(offload, "HostOffload", lambda weights: SimpleNamespace(pack=None, unpack=None, enter=None))
    model.model.embed_tokens.weight.requires_grad_(True)  # stays where it is
    offload.attach(model, 2)

    @contextmanager
    def saving():
        inside.append(True)
        yield
        inside.pop()

    seen = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: seen.append(bool(inside)))
    model.model.saving = saving
    ids = torch.zeros(1, 8, dtype=torch.int64)
    layout = Layout.packed(torch.tensor([0, 8], dtype=torch.int32), 8, (1, 8))
    model(Batch(ids, ids, torch.arange(8)[None], layout, 8))
    assert seen == [True, True, False]
    offload.attach(model)
    assert model.model.parked == BLOCKS


GIB = 1 << 30
EACH = {"none": 10, "selective": 8, "except_attention": 3, "parked": 1, "full": 1, "tiles": 1}  # of a block


def rungs(scale=1.0, fixed=100, blocks=10):
    made = []
    for each in NAMES:
        mode = {"parked": "except_attention", "tiles": "full"}.get(each, each)
        memory = Memory(recompute=mode, offload=each in ("parked", "full", "tiles"), tiled_mlp=64 * (each == "tiles"))
        assert name(memory) == each
        made.append(budget.Rung(memory, int(scale * (fixed + blocks * EACH[each]))))
    return made


def settled(allowed, *, scale=1.0, fixed=100, blocks=10):
    """What is found where blocks take `EACH` and estimates are `scale` times that; and what was measured for it."""
    seen = []

    def measure(memory):
        seen.append(memory)
        lean = memory.recompute_layers or blocks
        return fixed + lean * EACH[name(memory)] + (blocks - lean) * EACH[memory.recompute_rest]

    ladder = rungs(scale, fixed, blocks)
    at, peak = budget.choose(ladder, measure, allowed)
    setting, took = budget.mixed(ladder, at, peak, measure, allowed, blocks)
    assert took == measure(setting) <= allowed
    assert budget.cost(setting, blocks) <= budget.cost(ladder[at].memory, blocks)
    return setting, seen[:-1]


@pytest.mark.parametrize(
    ("allowed", "count", "rest"),
    [
        (200, 0, ""), (109, 0, ""),  # everything is kept; only tiles would do
        (195, 3, "none"),  # 7 blocks of 10, each 0.02 of its time
        (187, 0, ""),  # 3 blocks would gain half a percent
        (124, 8, "selective"),  # 8 x 1 + 2 x 8
        (152, 4, "selective"),
    ],
)  # fmt: skip
def test_what_is_left_goes_to_as_many_blocks_as_it_lasts_for(allowed, count, rest):
    if allowed == 109:
        with pytest.raises(UserError, match="leanest setting"):
            settled(allowed)
        return
    setting, seen = settled(allowed)
    assert (setting.recompute_layers, setting.recompute_rest if count else "") == (count, rest)
    if rest == "selective":
        assert name(setting) == "parked", "the fastest of the lean ones"
    assert len(seen) <= 1 + budget.TRIES


@pytest.mark.parametrize("scale", [0.7, 0.9, 1.1, 1.4])
@pytest.mark.parametrize("allowed", [112, 125, 150, 165, 179])
def test_estimates_that_are_off_are_measured_away(scale, allowed):
    setting, seen = settled(allowed, scale=scale, blocks=10)
    exact, _ = settled(allowed)
    assert budget.cost(setting, 10) <= budget.cost(exact, 10) + 0.035
    assert len(seen) <= len(NAMES) + budget.TRIES


def test_a_guess_that_was_too_careful_is_made_again():
    """Estimates say 8 blocks; each try tells that more is left."""
    ladder, seen = rungs(), []
    for at, high in ((0, 300), (1, 260)):
        ladder[at] = budget.Rung(ladder[at].memory, high)

    def measure(memory):
        seen.append(memory.recompute_layers)
        return 100 + memory.recompute_layers + 8 * (10 - memory.recompute_layers)

    setting, took = budget.mixed(ladder, 3, 110, measure, 150, 10)
    assert seen == [8, 7, 6] and setting.recompute_layers == 6 and took == 138


def test_a_mixture_that_runs_out_of_memory_leaves_the_plain_setting():
    ladder = rungs()
    setting, took = budget.mixed(ladder, 3, 110, lambda memory: None, 150, 10)
    assert (setting, took) == (ladder[3].memory, 110)


def test_estimates_lie_between_those_of_their_parts(folder):
    model = load.build(folder, torch.float32)
    cfg = SimpleNamespace(dtype="bf16", batch=SimpleNamespace(micro_rows=4, rows=4), data=SimpleNamespace(seq_len=512))

    def about(**memory):
        cfg.memory = Memory(**memory)
        return preflight.need(model, cfg, 1).about

    for lean in ({"recompute": "full"}, {"recompute": "except_attention", "offload": True}):
        sizes = [about(**lean)]
        sizes += [about(**lean, recompute_layers=n, recompute_rest="selective") for n in (3, 2, 1)]
        assert sizes[0] == sizes[1]
        each = [more - less for less, more in pairwise([*sizes[1:], about(recompute="selective")])]
        assert each == pytest.approx([sum(each) / BLOCKS] * BLOCKS, rel=0.02)


def test_what_makes_no_sense_is_told():
    for wrong, what in (
        ({"recompute_layers": -1}, "must not be negative"),
        ({"recompute_rest": "selective"}, "set that too"),
        ({"recompute": "selective", "recompute_layers": 2, "recompute_rest": "selective"}, "must keep more"),
        ({"recompute": "none", "recompute_layers": 2}, "nothing to compute again"),
        ({"budget_gib": 8.0, "recompute_layers": 2}, "finds"),
        ({"budget_gib": 8.0, "recompute_rest": "selective"}, "finds"),
    ):
        with pytest.raises(ValueError, match=what):
            Memory(**wrong)
    with pytest.raises(UserError, match="the model has 28 blocks") as caught:
        recompute.check(Memory(recompute_layers=29), 28)
    assert caught.value.where == "memory.recompute_layers"
    recompute.check(Memory(recompute_layers=28), 28)
    words = budget.words(Memory(recompute="full", recompute_layers=20, recompute_rest="selective"))
    assert words == "recompute full, in 20 blocks, recompute selective in the rest"
