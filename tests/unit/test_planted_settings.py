"""What a memory setting does, apart from numbers that stay the same: blocks that run twice, compilers that are told, a
budget that is measured and remembered. Faults planted here went unseen, as every result was right."""

import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config as partitioner
from parity.shrink import shrunk
from unit.test_graphs import LENGTH, Rerun

from ftlib import budget, models, preflight
from ftlib.adapters import lora
from ftlib.errors import Problems, UserError
from ftlib.kernels import fp8_linear, lora_linear  # noqa: F401 - which register operators
from ftlib.layers.batch import Batch as Rows
from ftlib.layers.batch import Layout
from ftlib.layers.mlp import Mlp, feed_forward
from ftlib.models import LanguageModel, families
from ftlib.parallel import graphs, recompute
from ftlib.quant.qat import RoundedLinear
from ftlib.sections import Batch, Data, Lisa, Loss, Memory, Relora, Source

CPU = torch.device("cpu")
IDS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    return models.from_pretrained("ftlib:demo/model").train()


@pytest.mark.parametrize(
    ("setting", "runs"),
    [("none", [1, 1, 1, 1]), ("selective", [2, 1, 2, 1]), ("except_attention", [2] * 4), ("full", [2] * 4)],
)
def test_a_block_that_is_recomputed_runs_twice(model, setting, runs):
    """Once more in backward; without gradients once."""
    recompute.use(model, Memory(recompute=setting, compile="auto"), CPU)
    ran = Counter()
    for i, block in enumerate(model.model.layers):
        block.attn_pre.register_forward_hook(lambda *_, i=i: ran.update([i]))
    model.logits(IDS).square().mean().backward()
    assert [ran[i] for i in range(4)] == runs
    with torch.no_grad():
        model.logits(IDS)
    assert [ran[i] for i in range(4)] == [n + 1 for n in runs]


@pytest.mark.parametrize("tile", [0, 16])
def test_what_is_dropped_is_dropped_again_when_it_is_recomputed(model, tile):
    lora.attach(model, "all-linear", rank=4, dropout=0.5)
    lora.reset(model, 0)
    found = []
    for setting in ("none", "full"):
        recompute.use(model, Memory(recompute=setting, tiled_mlp=tile), CPU)
        model.zero_grad()
        torch.manual_seed(5)
        model.logits(IDS).log_softmax(-1)[..., 7].mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)
    assert any(grad.abs().max() > 0 for grad in found[0].values())


def test_blocks_that_predict_further_have_the_setting_too(model):
    deeper = SimpleNamespace(block=type(model.model.layers[0])(model.arch, model.arch.layers[0], 0))
    model.__dict__["mtp"] = [deeper]
    for memory in (Memory(recompute="full", tiled_mlp=16), Memory(recompute="none")):
        recompute.use(model, memory, CPU)
        assert deeper.block.recompute is (memory.recompute == "full")
        assert [block.mlp.tile for block in (deeper.block, *model.model.layers)] == [memory.tiled_mlp] * 5


@pytest.mark.parametrize(("tile", "pieces"), [(6, [6, 6, 3]), (5, [5] * 3), (14, [14, 1]), (15, []), (16, []), (0, [])])
def test_a_tile_is_of_tokens_whatever_rows_they_lie_in(tile, pieces):
    layer, seen = feed_forward(Mlp(hidden=8), 4), []
    layer.tile, whole = tile, layer.whole
    layer.whole = lambda x: seen.append(tuple(x.shape)) or whole(x)
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        found = layer(x)
    assert seen == ([(n, 4) for n in pieces] or [(3, 5, 4)])
    torch.testing.assert_close(found, whole(x))


@partitioner.patch(activation_memory_budget=1.0, aggressive_recomputation=False)  # undone afterwards
def test_the_compiler_is_told_each_setting_anew(model, monkeypatch):
    told = []

    def compiler(function, **how):
        plain = function.args[0] if isinstance(function, partial) else function
        assert plain.__name__ == "compute", "what an earlier setting compiled is not compiled again"
        told.append(how)
        return lambda *inputs: function(*inputs)

    monkeypatch.setattr(torch, "compile", compiler)
    model.requires_grad_(False)
    found = {}
    for setting in ("except_attention", "none", "full", "selective"):
        recompute.use(model, Memory(recompute=setting, compile=True), CPU)
        found[setting] = (partitioner.activation_memory_budget, partitioner.aggressive_recomputation)
    rest = dict.fromkeys(("none", "selective"), (1.0, False))
    assert found == {"except_attention": (1.0, True), "full": (0.0, False), **rest}
    assert all(how == {"fullgraph": True} for how in told) and len(told) == 16
    model.model.layers[1].rounded = RoundedLinear.__new__(RoundedLinear)
    torch.nn.Module.__init__(model.model.layers[1].rounded)
    told.clear()
    recompute.use(model, Memory(recompute="none", compile=True), CPU)
    exact = {"eager_numerics.division_rounding": True}
    assert told == [{"fullgraph": True, "options": exact}] * 4, "division as in the files of rounded weights"


def test_products_of_every_kind_are_kept_by_selective():
    aten, ours = torch.ops.aten, torch.ops.ftlib
    products = (aten.mm, aten.addmm, aten.bmm, aten._scaled_mm, aten.convolution, aten._grouped_mm, ours.lora_project)
    products += (aten._scaled_dot_product_flash_attention, aten._flash_attention_forward, ours.fp8_product)
    others = (aten.mul, aten.silu, aten.rsqrt, aten.add, aten.cat, aten.mean)
    for kept, operators in ((True, products), (False, others)):
        for operator in operators:
            name = str(getattr(operator, operator.overloads()[0]))
            assert (recompute.PRODUCTS.search(name) is not None) is kept, name
    assert re.search(recompute.ATTENTION, "aten._scaled_dot_product_cudnn_attention.default")
    assert not re.search(recompute.ATTENTION, "ftlib.lora_project.default")


def test_every_section_that_changes_memory_is_part_of_the_question():
    keys = (
        "model",
        "lora",
        "train",
        "lisa",
        "qat",
        "loss",
        "mtp",
        "optim",
        "memory",
        "dtype",
        "deterministic",
        "batch",
    )
    cfg = SimpleNamespace(**dict.fromkeys((*keys, "sizes", "context"), "as it was"), data=SimpleNamespace(seq_len=64))
    asked = budget.question(cfg, CPU)
    assert asked == budget.question(cfg, CPU) and asked["torch"] == torch.__version__
    for key in (*keys, "sizes", "context"):
        assert budget.question(SimpleNamespace(**vars(cfg) | {key: "another"}), CPU) != asked, key
    assert budget.question(SimpleNamespace(**vars(cfg) | {"data": SimpleNamespace(seq_len=128)}), CPU) != asked


def test_the_room_there_is(monkeypatch):
    """GiB are asked for; of a GPU what is free, and what this process holds and can use again."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60_000, 100_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15_000)
    assert budget.room(24.0, CPU) == 24 * 1024**3 and budget.room(0.5, CPU) == 512 * 1024**2
    assert 65_000 < budget.room("auto", CPU) < 75_000


@pytest.mark.parametrize(
    ("tokens", "dense", "tiles"), [(16_384, True, True), (16_383, True, False), (65_536, False, False)]
)
def test_tiles_are_tried_where_rows_have_two_of_them_and_layers_can(tokens, dense, tiles, monkeypatch):
    monkeypatch.setattr(budget.preflight, "need", lambda model, cfg, shards: SimpleNamespace(about=1))
    mlp = SimpleNamespace(tile=0) if dense else SimpleNamespace()
    model = SimpleNamespace(
        model=SimpleNamespace(layers=[SimpleNamespace(mlp=SimpleNamespace(tile=0)), SimpleNamespace(mlp=mlp)])
    )
    cfg = SimpleNamespace(
        memory=Memory(budget_gib=8.0), batch=SimpleNamespace(micro_rows=1), data=SimpleNamespace(seq_len=tokens)
    )
    tiled = [bool(rung.memory.tiled_mlp) for rung in budget.ladder(model, cfg)]
    assert any(tiled) is tiles and tiled == sorted(tiled), "the leanest have them"


class Gpu:
    """Its counters of memory: a pass takes 5 bytes, the first 9; a gradient 2, if it is there before."""

    def __init__(self, monkeypatch, fails=False):
        self.peak, self.passes, self.batches, self.fails = 0, 0, [], fails
        for name in ("empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        monkeypatch.setattr(budget, "learn", self.learn)

    def learn(self, model, batch, rule):
        self.batches.append(batch)
        self.passes += 1
        there = model.weight.grad is not None
        self.peak = max(self.peak, (9 if self.passes == 1 else 5) + 2 * there)
        model.weight.grad = torch.ones_like(model.weight)
        if self.fails:
            raise torch.OutOfMemoryError


@pytest.mark.parametrize(("rows", "peak"), [(3, 5), (6, 7)], ids=["one forward", "adds up"])
def test_a_trial_is_the_second_pass_over_a_whole_micro_batch(monkeypatch, rows, peak):
    gpu, model = Gpu(monkeypatch), torch.nn.Linear(2, 2, bias=False)
    model.arch = SimpleNamespace(vocab=11)
    cfg = SimpleNamespace(batch=SimpleNamespace(rows=rows, micro_rows=3), data=SimpleNamespace(seq_len=16), loss=None)
    assert budget.trial(model, cfg, CPU) == peak and gpu.passes == 2 and model.weight.grad is None
    batch = gpu.batches[1]
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 16)
    assert batch.target_tokens == 48 and batch.layout.cu_seqlens.tolist() == [0, 8, 16, 24, 32, 40, 48]
    assert batch.layout.extent.tolist() == [6, 8]


def test_a_trial_that_runs_out_of_memory_leaves_nothing_behind(monkeypatch):
    Gpu(monkeypatch, fails=True)
    model = torch.nn.Linear(2, 2, bias=False)
    model.arch = SimpleNamespace(vocab=11)
    cfg = SimpleNamespace(batch=SimpleNamespace(rows=3, micro_rows=3), data=SimpleNamespace(seq_len=16), loss=None)
    assert budget.trial(model, cfg, CPU) is None and model.weight.grad is None


def test_the_estimate_of_except_attention_has_attention_s_outputs():
    """bf16 numbers of 2 rows of 64 tokens, in 4 layers, beside what `full` keeps."""
    model, kept = models.from_pretrained("ftlib:demo/model", dtype=torch.bfloat16), {}
    for setting in ("full", "except_attention"):
        data = Data(sources=(Source(path="x"),), seq_len=64)
        cfg = SimpleNamespace(dtype="bf16", data=data, batch=Batch(micro_rows=2), memory=Memory(recompute=setting))
        kept[setting] = preflight.need(model, cfg, 1).kept
    (width,) = {layer.mixer.heads * layer.mixer.head_dim for layer in model.arch.layers}
    assert kept["except_attention"] - kept["full"] == 2 * (2 * 64) * 4 * width


def graphed(**sections):
    base = {"memory": Memory(cuda_graph=True), "loss": Loss(), "model": SimpleNamespace(code=None)}
    return SimpleNamespace(**base | sections)


def test_what_changes_between_passes_is_not_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    graphs.check(graphed(relora=Relora(), lisa=Lisa()), 1)
    for section, words in (
        ({"relora": Relora(every=100)}, r"relora\.every"),
        ({"lisa": Lisa(layers=2)}, r"lisa\.layers"),
    ):
        with pytest.raises(Problems, match=words):
            graphs.check(graphed(**section), 1)
    other = graphed()
    del other.loss
    with pytest.raises(Problems, match="next-token"):
        graphs.check(other, 1)


def test_experts_are_not_recorded():
    settings = shrunk("qwen3-30b-a3b", vocab_size=64)
    arch, table = families.read(settings)
    with torch.device("meta"):
        model = LanguageModel(arch, table, settings)
    model.model.backend = "varlen"
    with pytest.raises(UserError, match="experts"):
        graphs.attach(model)


def test_bounds_grow_by_powers_of_two():
    """Else a run of long documents has more of them than pairs of graphs are kept."""
    for longest, bound in ((100, 128), (129, 256), (300, 512), (1025, 2048)):
        extent = torch.tensor([1, longest], dtype=torch.int32)
        layout = Layout.packed(torch.zeros(101, dtype=torch.int32), 1 << 20, (1, 1 << 20), extent)
        assert graphs.bounds(layout, "varlen").tolist() == [32, bound]


def test_an_embedding_that_begins_to_train_has_its_gradient(model):
    """Its passes are others than those that were recorded while it was frozen."""
    model = model.double()

    def gradient(seed):
        model.zero_grad()
        model(rows_of(seed, LENGTH)).pow(2).sum().backward()
        return model.model.embed_tokens.weight.grad

    wanted = gradient(2).clone()
    model.model.blocks = graphs.Blocks(model.model, Rerun())
    model.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(False)
    assert gradient(1) is None
    model.model.embed_tokens.weight.requires_grad_(True)
    torch.testing.assert_close(gradient(2), wanted)


def rows_of(seed, length):
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    layout = Layout.packed(ends, length, (2, length), torch.tensor([2, length], dtype=torch.int32))
    return Rows(ids, ids, torch.arange(length).expand(2, length), layout, ids.numel())


def test_the_peak_counts_what_graphs_keep(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    assert graphs.peak(model) == 100
    for highest, unseen, peak in ((0, 30, 130), (500, 30, 500)):
        model.model.blocks = graphs.Blocks(model.model, SimpleNamespace(highest=highest, unseen=unseen))
        assert graphs.peak(model) == peak
        del model.model.blocks
