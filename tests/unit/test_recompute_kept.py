"""What a compiled block keeps for backward, and what it computes a second time there."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from tiny_model import ROOT, fill_bases
from torch.profiler import ProfilerActivity, profile

from ftlib import quant
from ftlib.adapters import lora
from ftlib.adapters.fuse import fuse
from ftlib.layers.batch import Batch, Layout
from ftlib.models import initial, load
from ftlib.models.load import base_state
from ftlib.parallel import recompute
from ftlib.sections import Memory

ROWS, LENGTH, HEADS, WIDTH = 2, 64, 4, 16


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A folder with a one-layer model's config; blocks are cut in forward and backward, and no code is written."""
    cut = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", cut)
    torch._dynamo.reset()
    config = json.loads((ROOT / "tests/parity/configs/qwen3-0.6b.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": WIDTH}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    return tmp_path


def built(folder, adapters):
    """A model with weights of its own, all of them trained, or fused adapters on it alone."""
    model = load.build(folder, torch.float32).to_empty(device="cpu")
    model.tie()
    initial.init_weights(model, 0, None, True)
    if adapters:
        model.requires_grad_(False)
        lora.attach(model, "all-linear", rank=4)
        lora.reset(model, 0)
        assert fuse(model) == 4 * len(model.model.layers)
    return model


def hidden_states(model, mode):
    """Of a batch, with blocks compiled under `mode`."""
    ends = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    model.model.use_attention("sdpa")
    recompute.use(model, Memory(recompute=mode, compile=True), torch.device("cpu"))
    return model(Batch(ids, ids, positions, Layout.packed(ends, LENGTH, (ROWS, LENGTH)), target_tokens=ids.numel()))


def test_except_attention_keeps_one_output_more_than_full(config):
    kept, gradients = {}, {}
    for mode in ("full", "except_attention"):
        torch._dynamo.reset()
        model = built(config, False)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (numbers.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            hidden = hidden_states(model, mode)
        hidden.square().sum().backward()
        kept[mode] = sum(numbers)
        gradients[mode] = [p.grad for p in model.parameters() if p.grad is not None]
    attended = ROWS * LENGTH * HEADS * (WIDTH + 1)  # and the sums of its softmax
    assert kept["except_attention"] - kept["full"] == attended
    torch.testing.assert_close(gradients["except_attention"], gradients["full"])


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "every weight"])
def test_selective_repeats_no_product_and_keeps_little_else(adapters, config):
    """What it leaves out: the outputs of two norms, those of queries and keys and their rotations, the product inside
    the feed-forward layer. The compiler's own choice once was to repeat all fused products of a small model."""
    kept, gradients = {}, {}
    for mode in ("none", "selective"):
        torch._dynamo.reset()
        model = built(config, adapters)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (numbers.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            hidden = hidden_states(model, mode)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            hidden.square().sum().backward()
        called = Counter(event.name for event in seen.events())
        kept[mode], gradients[mode] = sum(numbers), [p.grad for p in model.parameters() if p.grad is not None]
        assert called["ftlib::lora_project"] == 0
        assert called["ftlib::lora_project_backward"] == (4 if adapters else 0)
        assert not any("scaled_dot_product" in name and "backward" not in name for name in called)
    torch.testing.assert_close(gradients["selective"], gradients["none"])
    left_out = 2 * 64 + 2 * (4 + 2) * WIDTH + 128  # channels
    assert kept["none"] - kept["selective"] > 0.6 * left_out * ROWS * LENGTH


@pytest.mark.parametrize(("mode", "form"), [("full", None), ("except_attention", "nf4")])
def test_the_last_product_of_a_block_is_not_repeated(mode, form, config):
    """Backward reads what goes into the product, not what comes out: of four fused products it repeats three. Matrices
    of a quantized base are made once in forward and once in backward."""
    model = load.build(config, torch.float32).to_empty(device="cpu")
    model.tie()
    initial.init_weights(model, 0, None, True)
    if form:
        weights = base_state(model)
        quant.hold(model, form)
        fill_bases(model, weights)
    model.requires_grad_(False)
    lora.attach(model, "all-linear", rank=4)
    lora.reset(model, 0)
    assert fuse(model) == 4
    hidden_states(model, mode).square().sum().backward()  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        hidden_states(model, mode).square().sum().backward()
    called = Counter(event.name for event in seen.events())
    assert called["ftlib::lora_project"] == 4 + 3 and called["ftlib::lora_project_backward"] == 4
    assert called["ftlib::frozen_stack"] == (4 + 4 if form else 0)
