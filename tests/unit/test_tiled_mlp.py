"""Feed-forward layers a tile of tokens at a time (`memory.tiled_mlp`): the same step in less memory."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
from parity.shrink import shrunk

from ftlib import preflight
from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.layers.mlp import GatedMlp, Mlp
from ftlib.models import load
from ftlib.observe import diagnose
from ftlib.parallel import check
from ftlib.parallel import run as processes
from ftlib.parallel.apply import apply
from ftlib.sections import Batch, Data, Memory, Parallel, Source

IDS = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))


def write(path, name):
    (path / "config.json").write_text(json.dumps(shrunk(name, num_hidden_layers=2, tie_word_embeddings=True)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shape"), "qwen3-0.6b")


def step(folder, memory, adapters):
    """Loss and gradients in float64; the tiles do not divide the 48 tokens."""
    model = load.build(folder, torch.float64).to_empty(device="cpu")
    model.tie()
    model.model.init_weights(0)
    if adapters:
        lora.attach(model, "all-linear", rank=2, alpha=4)
        lora.reset(model, 0)
        with torch.no_grad():
            for _, _, factors in lora.adapted(model):
                factors.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    apply(model.double(), processes.start(Parallel(), 0), memory, torch.float64)
    loss = model.train().logits(IDS).log_softmax(-1)[..., 7].mean()
    loss.backward()
    with torch.no_grad():
        again = model.logits(IDS).log_softmax(-1)[..., 7].mean()
    return [loss.detach(), again, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("adapters", [False, True], ids=["all", "adapters"])
@pytest.mark.parametrize(("recompute", "name"), [("none", "qwen3-0.6b"), ("full", "qwen3-0.6b"), ("none", "afm-4.5b")])
def test_loss_and_gradients_are_the_same(tmp_path, recompute, name, adapters):
    folder = write(tmp_path, name)
    whole = step(folder, Memory(recompute="none"), adapters)
    tiled = step(folder, Memory(recompute=recompute, tiled_mlp=7), adapters)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(tiled, whole, strict=True))


def peak(run):
    """Bytes alive at once beyond those at the start, and those that autograd keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run().sum().backward()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch._functorch.config.patch(activation_memory_budget=1.0, aggressive_recomputation=False)  # as if nobody had set it
def test_less_is_kept_and_less_is_alive(compiled):
    found = {}
    for tile in (0, 32):
        layer = GatedMlp(Mlp(hidden=512), 32)
        layer.tile = tile
        x = torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        call = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else layer
        found[tile] = peak(lambda call=call, x=x: call(x))
        torch.compiler.reset()
    (most, kept), (tiled_most, tiled_kept) = found[0], found[32]
    assert tiled_kept < kept / 4, "gate, up and their product are not kept"
    assert tiled_most < most / 3, "nor are they made again all at once"


def test_the_estimate_counts_a_tile_and_the_way_out_of_memory_names_it(folder):
    def settings(tile):
        data = Data(sources=(Source(path="x"),), seq_len=32_768)
        return SimpleNamespace(dtype="bf16", data=data, batch=Batch(), memory=Memory(tiled_mlp=tile))

    model = load.build(folder, torch.bfloat16)
    whole, tiled = (preflight.need(model, settings(tile), 1) for tile in (0, 4096))
    inner = 2 * 32_768 * 3 * 96  # bytes of gate, up and product; backward's working set is a block and a third
    assert whole.working - tiled.working == pytest.approx(4 / 3 * inner * 7 / 8, rel=1e-3)
    assert any("memory.tiled_mlp: 0 -> 8192" in knob for knob in diagnose.knobs(settings(0)))
    assert not any("tiled" in knob for knob in diagnose.knobs(settings(4096)))


def test_experts_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shrunk("qwen3-30b-a3b")))
    cfg = SimpleNamespace(
        data=Data(sources=(Source(path="x"),), seq_len=64), parallel=Parallel(), memory=Memory(tiled_mlp=32)
    )
    with pytest.raises(UserError, match=r"where: memory\.tiled_mlp"):
        check.check(load.build(tmp_path, torch.float32), cfg, 1, 1)
