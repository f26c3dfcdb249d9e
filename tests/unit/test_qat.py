"""Rounded layers: gradients, adapters, and that a converted model is the one that was trained; torchao's rounding."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora, merge
from ftlib.errors import UserError
from ftlib.export import compressed
from ftlib.layers.linear import Linear
from ftlib.models import load
from ftlib.quant import qat
from ftlib.quant.qat import RoundedLinear
from ftlib.quant.schemes import SCHEMES, restore, to_int4
from ftlib.sections import Qat, Rounding

ALL = pytest.mark.parametrize("scheme", SCHEMES)
GROUP = {"int4": 16, "int8_int4": 16}  # fp8 has a scale a row


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int4_is_torchaos():
    """Its symmetric groups; it divides by 7.5 where the result says 7, so the scales are made equal first."""
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    weight = drawn(24, 96)
    codes, scales = to_int4(weight, 32)
    theirs = _fake_quantize_affine(
        weight, (1, 32), scales, torch.zeros_like(scales, dtype=torch.int32), torch.int32, -8, 7
    )
    assert torch.allclose(restore(codes, scales), theirs, atol=1e-6)
    assert codes.abs().amax() == 7 and (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7 - scales).abs().max() < 1e-6


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_near_and_of_few_values(scheme, dtype):
    weight, found = drawn(24, 96).to(dtype), SCHEMES[scheme]
    rounded = found.weight(weight, 32)
    assert rounded.dtype == dtype and 0 < relative(rounded, weight) < {"fp8": 0.04}.get(scheme, 0.1)
    scales = found.codes(weight, 32)[1]
    assert scales.shape == ((24, 1) if scheme == "fp8" else (24, 3)) and scales.dtype == dtype
    assert not found.weight(torch.zeros(8, 32), 32).any()
    if found.inputs is not None:
        x = drawn(2, 5, 96).to(dtype)
        x[0, 0] *= 1000  # another token's outlier is none of the others' business
        gap = (found.inputs(x) - x).float().norm(dim=-1) / x.float().norm(dim=-1)
        assert 0 < gap.max() < 0.04


@ALL
def test_forward_is_rounded_and_backward_is_straight(scheme):
    linear = Linear(64, 48, bias=True)
    layer, x = RoundedLinear(linear, scheme, 32), drawn(7, 64).requires_grad_()
    assert torch.equal(layer(x), linear(x))  # not on yet
    layer.on = True
    wide = SCHEMES[scheme]
    inputs = x if wide.inputs is None else wide.inputs(x)
    y = layer(x)
    assert torch.equal(y, F.linear(inputs, wide.weight(linear.weight, 32), linear.bias))
    grad_x, grad_w = torch.autograd.grad(y.square().sum(), (x, linear.weight))
    upstream = 2 * y.detach()
    assert torch.allclose(grad_x, upstream @ wide.weight(linear.weight, 32), atol=1e-4)
    assert torch.allclose(grad_w, upstream.T @ inputs, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    again = torch.autograd.grad(compiled(x).square().sum(), (x, linear.weight))
    assert torch.allclose(again[0], grad_x, atol=1e-4) and torch.allclose(again[1], grad_w, atol=1e-4)
    layer.on = False
    assert torch.equal(compiled(x), linear(x)), "compiled code sees the switch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = shrunk("phi-4-mini", intermediate_size=128)  # its checkpoint fuses q, k and v, and gate and up
    reference(config).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    return path


@ALL
def test_compiled_code_rounds_to_what_is_stored(scheme, folder):
    """In bfloat16, with an adapter: a compiler would keep scales and the merged matrix in more bits than files do."""
    model = models.from_pretrained(folder, dtype=torch.bfloat16).train()
    qat.attach(model, Qat(scheme=scheme, group=GROUP.get(scheme)), "qat")
    lora.attach(model, "all-linear", rank=4)
    lora.reset(model, 0)
    qat.at(1, model)
    layer = model.model.layers[0].mlp.down_proj
    factors, x = layer.adapters["policy"], drawn(9, layer.in_features).bfloat16()
    with torch.no_grad():
        factors.lora_B.copy_(drawn(*factors.lora_B.shape) / 50)
        merged = layer.scheme.weight(factors.merged(layer.weight).bfloat16(), layer.group)
        inputs = x if layer.scheme.inputs is None else layer.scheme.inputs(x)
        assert relative(torch.compile(layer)(x), F.linear(inputs, merged)) < 3e-3


@ALL
def test_the_converted_model_is_the_one_that_was_trained(scheme, folder, tmp_path):
    """A step of training with a rounded base and adapter, merged, written, read: to the bit."""
    model = models.from_pretrained(folder, dtype=torch.float32).train()
    section = Qat(scheme=scheme, group=GROUP.get(scheme), after=1)
    count = qat.attach(model, section, "qat")
    lora.attach(model, "all-linear", rank=4)
    lora.reset(model, 0)
    ids = torch.arange(3, 30)[None]
    plain = model.logits(ids)
    qat.at(1, model)
    assert torch.equal(model.logits(ids), plain)
    qat.at(2, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):
        model.logits(ids).square().mean().backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model.logits(ids)
        merge.merge_into(model)
        assert torch.equal(model.logits(ids), trained)
        qat.switch(model, False)
        assert not torch.equal(model.logits(ids), trained), "un-rounding changes what it computes"
    written = tmp_path / "written"
    models.save_pretrained(
        model, written, packed=(lambda tensors: compressed.packed(model, section, tensors), compressed.config(section))
    )
    read = models.from_pretrained(written, dtype=torch.float32)
    weights = load.base_state(read)
    for name, module in model.named_modules():
        if isinstance(module, RoundedLinear):
            assert torch.equal(weights[f"{name}.weight"], module.scheme.weight(module.weight, 16)), name
            count -= 1
    assert count == 0
    if SCHEMES[scheme].inputs is not None:
        qat.attach(read, section, "qat")
        for layer in qat.rounded(read):  # its weights are rounded already: inputs alone
            layer.on, layer.scheme = True, type(layer.scheme)(lambda w, g: (w, None), layer.scheme.inputs, True)
            object.__setattr__(layer.scheme, "weight", lambda w, g: w.clone())
    with torch.no_grad():
        assert torch.equal(read.logits(ids), trained)


@ALL
def test_the_config_says_what_is_written(scheme):
    """Others compute with what it says: bits, inputs that share a scale, and whether a token's inputs are rounded."""
    group = compressed.config(Rounding(scheme=scheme, group=GROUP.get(scheme)))["config_groups"]["group_0"]
    weights, inputs = group["weights"], group["input_activations"]
    found = weights["num_bits"], weights["type"], weights["strategy"], weights.get("group_size")
    assert found == ((8, "float", "channel", None) if scheme == "fp8" else (4, "int", "group", 16))
    wanted = {"int8_int4": (8, "int"), "fp8": (8, "float")}
    assert scheme not in wanted or (inputs["num_bits"], inputs["type"]) == wanted[scheme]
    assert inputs is None if scheme == "int4" else (inputs["strategy"] == "token" and inputs["dynamic"])


def test_a_mixture_of_experts_is_refused(tmp_path):
    """Its experts would stay as they are in a checkpoint that says they are rounded."""
    (tmp_path / "config.json").write_text(json.dumps(shrunk("qwen3-30b-a3b")))
    with pytest.raises(UserError, match=r"stack of experts(.|\n)*where: to, model\.path"):
        qat.attach(load.build(tmp_path, torch.float32), Rounding(group=8), "to")


@ALL
def test_transformers_reads_it(scheme, folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = models.from_pretrained(folder, dtype=torch.float32)
    section = Rounding(scheme=scheme, group=GROUP.get(scheme))
    qat.attach(model, section, "to")
    models.save_pretrained(
        model, tmp_path, packed=(lambda tensors: compressed.packed(model, section, tensors), compressed.config(section))
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    qat.switch(model, True)
    with torch.no_grad():
        assert relative(theirs(ids).logits, model.logits(ids)) < 1e-4
