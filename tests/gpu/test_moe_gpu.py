"""Grouped matrix products on the GPU against a loop over the experts in float64, and a mixture that trains on them."""

import copy

import numpy as np
import pytest
import torch
from parity.shrink import shrunk

from ftlib.adapters import lora
from ftlib.kernels import grouped_linear as kernel
from ftlib.layers.batch import from_documents
from ftlib.losses.balancing import Balance
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import LanguageModel, families
from ftlib.parallel import recompute
from ftlib.sections import Loss, Memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [[0, 3, 3, 700, 1000], [200, 400, 600, 800, 1000], [0, 0, 0, 0, 1000]])
def test_output_and_gradients(ends, transposed, compiled):
    """Skewed routing and experts without a token."""
    g = torch.Generator("cuda").manual_seed(0)
    ends = torch.tensor(ends, dtype=torch.int32, device="cuda")
    x = torch.randn(1000, 256, generator=g, device="cuda")
    weight = torch.randn(len(ends), *((256, 384) if transposed else (384, 256)), generator=g, device="cuda") / 16

    def run(f, dtype):
        parts = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        y = f(parts[0], parts[1].mT if transposed else parts[1], ends)
        return y, *torch.autograd.grad((y.double() * torch.sin(3 * y.detach().double())).sum(), parts)

    assert kernel._served(x.bfloat16(), weight.bfloat16())
    product = torch.compile(kernel.grouped_linear, fullgraph=True) if compiled else kernel.grouped_linear
    ours = run(product, torch.bfloat16)
    for found, exact in zip(ours, run(kernel.grouped_linear_reference, torch.float64), strict=True):
        assert error(found, exact) < 2e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_a_mixture_with_adapters(name, compiled):
    """Loss and gradients of adapters on attention and experts, against the same model in float32 and the loop."""
    wide = "intermediate_size" if name.startswith("gpt-oss") else "moe_intermediate_size"
    config = shrunk(name, hidden_size=256, vocab_size=1000, **{wide: 512}) | {"head_dim": 64}
    ids = torch.randint(3, 1000, (2, 64), generator=torch.Generator().manual_seed(1)).tolist()
    batch = from_documents([[(np.array(row), np.array([*row[1:], -100]))] for row in ids], 64, 0, 4).to("cuda")

    arch, table = families.read(config)
    model = LanguageModel(arch, table, config).to("cuda")
    model.model.init_weights(0, std=0.05)
    lora.attach(model, "all-linear", rank=8)
    lora.reset(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        for i, (_, _, factors) in enumerate(lora.adapted(model)):
            factors.lora_B.normal_(0, 0.05, generator=torch.Generator("cuda").manual_seed(i))

    def run(model):
        loss = next_token_loss(model(batch), model.lm_head.weight, batch.labels, batch.target_tokens)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    half = copy.deepcopy(model).bfloat16()
    if compiled:
        for layer in half.model.layers:
            layer.compile()
    (ours, gradients), (exact, references) = run(half), run(model)
    assert abs(ours / exact - 1) < 1e-2
    assert gradients.keys() == references.keys() and any("experts" in name for name in gradients)
    whole = [torch.cat([part[name].flatten().float() for name in sorted(part)]) for part in (gradients, references)]
    assert error(*whole) < 0.15  # rounding sends a few tokens to another expert


@pytest.mark.parametrize("kept", ["none", "selective", "except_attention", "full"])
def test_the_balancing_loss_of_compiled_blocks(kept, monkeypatch):
    """In bf16, packed and compiled, whatever is recomputed, against float32 as it is; equal bits when repeated."""
    config = shrunk("qwen3-30b-a3b", hidden_size=256, vocab_size=1000, moe_intermediate_size=512) | {"head_dim": 64}
    ids = torch.randint(3, 1000, (2, 50), generator=torch.Generator().manual_seed(1)).tolist()
    batch = from_documents([[(np.array(row), np.array([*row[1:], -100]))] for row in ids], 64, 0, 4).to("cuda")
    arch, table = families.read(config)
    model = LanguageModel(arch, table, config).to("cuda")
    model.model.init_weights(0, std=0.05)
    half = copy.deepcopy(model).bfloat16()
    half.model.use_attention("varlen")
    recompute.use(half, Memory(recompute=kept, compile=True), torch.device("cuda"))

    def run(model):
        model.zero_grad()
        balance = Balance(model, Loss(router_aux=1.0))
        model(batch)
        loss = balance(batch) / batch.target_tokens
        loss.backward()
        return loss.item(), [block.mlp.gate.weight.grad.clone() for block in model.model.layers]

    exact, references = run(model)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        (ours, gradients), (again, repeated) = run(half), run(half)
    finally:
        torch.use_deterministic_algorithms(False)
    assert abs(ours / exact - 1) < 1e-2 and exact > config["num_experts_per_tok"]
    assert ours == again and all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))
    assert error(torch.cat(gradients).float(), torch.cat(references)) < 0.3  # a few tokens go to another expert
