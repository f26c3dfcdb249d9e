"""Useful work that a token counts for: of a model that mostly sleeps, of one in few bits, and through windows."""

import pytest
import torch
from parity.shrink import published, shrunk

from ftlib import models
from ftlib.adapters import lora
from ftlib.models import LanguageModel, families
from ftlib.observe import count_weights, device_peak, flops_per_token
from ftlib.quant import hold
from ftlib.sections import Lisa


def test_layers_that_sleep_are_counted_as_frozen():
    """No gradients of theirs are computed: 4 FLOP a number and token, not 6."""
    model = models.from_pretrained("ftlib:demo/model")
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    head = model.lm_head.weight.numel()
    model.requires_grad_(True)
    assert count_weights(model) == (0, 4 * block + head)
    model.lisa = (Lisa(layers=1), 0)
    assert count_weights(model) == (3 * block, block + head)


def test_a_number_in_few_bits_is_a_number():
    model = models.from_pretrained("ftlib:demo/model")
    model.requires_grad_(False)
    plain = count_weights(model)
    assert plain[0] > 0 and hold(model, "nf4") == 28
    assert count_weights(model) == plain
    arch, table = families.read(shrunk("qwen3-30b-a3b"))
    with torch.device("meta"):
        model = LanguageModel(arch, table, shrunk("qwen3-30b-a3b")).requires_grad_(False)
    plain = count_weights(model)
    assert hold(model, "int8") > 0 and count_weights(model) == plain, "of experts a share"


@pytest.mark.parametrize("adapters", [False, True], ids=["alone", "with adapters"])
def test_a_token_goes_through_the_experts_that_are_chosen_for_it(adapters):
    """Qwen3-30B-A3B: 8 of 128 experts, and of their adapters; 3.04 of 30.2 billion weights."""
    arch, table = families.read(published("qwen3-30b-a3b"))
    with torch.device("meta"):
        model = LanguageModel(arch, table, published("qwen3-30b-a3b"))
    model.requires_grad_(False)
    if adapters:
        lora.attach(model, "all-linear", rank=4)
    every = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    wanted = [0.0, 0.0]
    for name, p in every:
        wanted[p.requires_grad] += p.numel() * (8 / 128 if ".experts" in name else 1)
    assert count_weights(model) == tuple(wanted) and 3.0e9 < wanted[0] < 3.1e9
    assert (wanted[1] > 0) == adapters


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_a_query_sees_the_keys_of_its_window_that_are_there(window):
    """12 FLOP a channel and key, counted key by key; the rule takes half a row for the mean of 1 to its length."""
    keys = [min(at + 1, window or 64) for at in range(64)]
    found = flops_per_token(0, 0, [(8, window), (8, None)], 64) - flops_per_token(0, 0, [(8, None)], 64)
    assert found == pytest.approx(12 * 8 * sum(keys) / 64, abs=12 * 8 * 0.51)


def test_an_h200_is_an_h100_with_more_memory():
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB")
    peaks = [device_peak(name).datasheet for name in names]
    assert peaks[0] == peaks[1] and peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
