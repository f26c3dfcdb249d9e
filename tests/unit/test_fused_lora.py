"""The fused projection with adapters: against every product on its own, and inside a model."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk
from tiny_model import fill_bases

from ftlib import models, quant
from ftlib.adapters import lora, merge
from ftlib.adapters.fuse import fuse
from ftlib.kernels.lora_linear import lora_project, lora_project_reference
from ftlib.models.load import base_state
from ftlib.quant import FORMATS
from ftlib.quant.fused import frozen_lora_project


def operands(dim, outs, rank, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    out, ranks = sum(outs), rank * len(outs)
    x = normal(7, dim).requires_grad_()
    a = [normal(rank, dim).requires_grad_() for _ in outs]
    b = [normal(o, rank).requires_grad_() for o in outs]
    stacked = torch.zeros(out + ranks, dim + ranks, dtype=dtype)
    stacked[:out, :dim] = normal(out, dim)
    row = 0
    for i, (low, high) in enumerate(zip(a, b, strict=True)):
        at = slice(i * rank, (i + 1) * rank)
        stacked[out:, :dim][at] = low.detach()
        stacked[row : row + len(high), dim:][:, at] = high.detach()
        row += len(high)
    return x, stacked, a, b


@pytest.mark.parametrize(("dim", "outs"), [(6, (5, 3)), (12, (5, 3)), (8, (8,)), (3, (7,)), (16, (4, 2, 2))])
@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_value_and_gradients_equal_separate_products(dim, outs, gate):
    """Behind a shut gate those of the frozen weight alone, and none for the factors."""
    results = []
    for project in (lora_project, lora_project_reference):
        x, stacked, a, b = operands(dim, outs, rank=2)
        if project is lora_project_reference:
            y = project(x, stacked, a, b, 1.5 if gate is None else 1.5 * gate)
        else:
            y = project(x, stacked, a, b, 1.5, None if gate is None else torch.tensor(gate))
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, *a, *b))))
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-12) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(("dim", "outs"), [(6, (5, 3)), (12, (5, 3))])
def test_operator_is_sound_under_autograd_and_fake_tensors(dim, outs):
    x, stacked, a, b = operands(dim, outs, rank=2)
    low = torch.randn(len(x), 2 * len(a), dtype=x.dtype)
    torch.library.opcheck(torch.ops.ftlib.lora_project.default, (x, low, stacked, a, b, 1.5, None))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("once", [False, True])
def test_of_quantized_weights_too(form, once):
    """The matrix made for each call is the one that adapters and weights make; so are the gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 128, generator=g).requires_grad_()
    weights = [torch.randn(out, 128, generator=g) for out in (96, 32)]
    a, b = (
        [torch.randn(*s, generator=g).requires_grad_() for s in sizes] for sizes in ([(3, 128)] * 2, [(96, 3), (32, 3)])
    )
    held = [FORMATS[form].quantize(weight) for weight in weights]
    parts = [part for each in held for part in each.values()]
    found = []
    for y in (
        frozen_lora_project(x, parts, form, a, b, 1.5, once=once),
        torch.cat([
            x @ FORMATS[form].dequantize(*each.values(), x.dtype).T + 1.5 * (x @ low.T) @ high.T
            for each, low, high in zip(held, a, b, strict=True)
        ], -1),
    ):  # fmt: skip
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *a, *b))))
    assert all(relative(ours, plain) < 1e-5 for ours, plain in zip(*found, strict=True))
    if "fp8" not in form and not once:  # which the check's own comparison cannot do
        low = torch.randn(len(x), 6)
        torch.library.opcheck(torch.ops.ftlib.frozen_lora_project.default, (x, low, parts, form, a, b, 1.5, None))


def test_between_forward_and_backward_weights_are_codes():
    """No whole matrix waits for backward, unless the block is computed again anyway (`once`)."""
    weight, factors = torch.randn(256, 128), (torch.zeros(2, 128), torch.zeros(256, 2))
    a, b = ([factor.requires_grad_()] for factor in factors)
    x, most = torch.randn(3, 128).requires_grad_(), []
    for once in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.nbytes), t)[1], lambda t: t):
            frozen_lora_project(x, list(FORMATS["nf4"].quantize(weight).values()), "nf4", a, b, 1.5, once=once)
        most.append(max(kept))
    assert most[0] == weight.numel() // 2 and most[1] > weight.nbytes


def test_switched_off_is_what_an_adapter_that_does_nothing_gives(tmp_path):
    """To the bit, in the precision of a GPU run: the first loss against a reference is then exact."""
    config = shrunk("qwen3-0.6b")
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(0))
    model = models.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    lora.attach(model, "all-linear", rank=4, alpha=8)
    lora.reset(model, 0)
    fuse(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    policy = model.logits(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with lora.use(model, None):
        assert torch.equal(model.logits(x), policy)
    assert graphs and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "off has code of its own"
    with torch.no_grad():
        for _, _, f in lora.adapted(model):
            f.lora_B.fill_(0.1)
    with lora.use(model, None):
        assert torch.equal(model.logits(x), policy)
        with lora.use(model, "policy"):
            assert not torch.equal(model.logits(x), policy)
        assert torch.equal(model.logits(x), policy)
    assert not torch.equal(model.logits(x), policy)


def test_switched_off_while_another_adapter_is_on(tmp_path):
    config = shrunk("qwen3-0.6b")
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(0))
    model = models.from_pretrained(tmp_path)
    for name in ("policy", "other"):
        lora.attach(model, "all-linear", rank=4, alpha=8, name=name)
        lora.reset(model, 0, name)
    with torch.no_grad():
        for name in ("policy", "other"):
            for _, _, f in lora.adapted(model, name):
                f.lora_B.fill_(0.1)
        with lora.use(model, None):
            bare = model.logits(x)
        fuse(model)
        with lora.use(model, "other"):
            other = model.logits(x)
            with lora.use(model, None):
                assert relative(model.logits(x), bare) <= 1e-6
            assert torch.equal(model.logits(x), other) and relative(other, bare) > 0.01
        merge.merge_into(model, "policy")
        merged = model.logits(x)
        with lora.use(model, None):
            assert torch.equal(model.logits(x), merged)


@pytest.mark.parametrize(("form", "name"), [(None, "qwen3-0.6b"), ("nf4", "qwen3-0.6b"), (None, "afm-4.5b")])
def test_a_fused_model_equals_the_plain_one(form, name, tmp_path):
    config = shrunk(name, intermediate_size=128, head_dim=16)
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        model = models.from_pretrained(tmp_path).train()
        if form:
            weights = base_state(model)
            quant.hold(model, form)
            fill_bases(model, weights)
        lora.attach(model, "all-linear", rank=4, alpha=8)
        lora.reset(model, 0)
        if fused:
            assert fuse(model) == 4 * 3
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():  # after fusing: the copies must follow the parameters
            for _, _, f in lora.adapted(model):
                f.lora_B.normal_(0, 0.1, generator=g)
        logits = model.logits(x)
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        with lora.use(model, None), torch.no_grad():
            off = model.logits(x)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        merged = logits.detach()
        if not form:
            merge.merge_into(model)
            with torch.no_grad():
                merged = model.logits(x)
        found.append((logits, gradients, off, state, merged))
    plain, fused = found
    assert relative(fused[0], plain[0]) <= 1e-5 and relative(fused[2], plain[2]) <= 1e-6
    assert relative(fused[4], fused[0]) <= 1e-5
    assert plain[1].keys() == fused[1].keys()
    assert max(relative(fused[1][n], g) for n, g in plain[1].items()) <= 1e-5
    assert plain[3].keys() == fused[3].keys() and all(torch.equal(fused[3][n], t) for n, t in plain[3].items())
