"""Attention with sinks on every backend against the plain formula, and which backend a model gets."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftlib import build, config, plugins, preflight
from ftlib.cli import assets, env
from ftlib.errors import UserError
from ftlib.kernels import flex_attention
from ftlib.kernels import varlen_attention as varlen
from ftlib.kernels.capability import without_bf16
from ftlib.layers.attention import attend, choose_backend
from ftlib.layers.batch import Layout, from_documents
from ftlib.layers.shared_prefix import SharedPrefix
from ftlib.observe.output import attention_note
from ftlib.sections import Parallel

CUDA = torch.device("cuda")
ENDS = torch.tensor([0, 9, 16, 20, 32, 32], dtype=torch.int32)  # of two rows of 16 tokens
POSITIONS = torch.tensor([[*range(9), *range(9, 16)], [*range(4), *range(4, 16)]])  # where answers follow prompts


def shared_prefix():
    parents = torch.tensor([0, 0, 2, 2, 4], dtype=torch.int32)
    extent = torch.tensor([4, 16], dtype=torch.int32)
    return SharedPrefix(ENDS, 16, (2, 16), extent=extent, most_keys=64, parents=parents, positions=POSITIONS)


def operands(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, heads, 8, generator=g, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    return q, k, v, torch.randn(4, generator=g, dtype=dtype).requires_grad_()


def run(backend, window, layout):
    q, k, v, sinks = operands()
    layout.prepare(backend, {window})
    y = attend(q, k, v, layout, backend=backend, window=window, sinks=sinks)
    return y, *torch.autograd.grad((y * torch.sin(y.detach() * 9)).sum(), (q, k, v, sinks))


def flash_forward(q, k, v, cu_seqlens, cu_keys, length, scale, window, causal=True):
    """What the kernel returns: output and logarithm of the sum of exponentials [heads, N], inf where no key is seen."""
    weights = scores(q, k, cu_seqlens, cu_keys, scale, window, causal)
    lse = weights.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    out = torch.einsum("hqk,khd->qhd", (weights - lse[..., None]).exp(), v.repeat_interleave(2, 1))
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0, dtype=torch.uint64)


def flash_backward(grad, q, k, v, out, lse, cu_seqlens, cu_keys, seed, unused, length, scale, window, causal=True):
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691), algorithm 2, without its tiles."""
    p = (scores(q, k, cu_seqlens, cu_keys, scale, window, causal) - lse[..., None]).exp()
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    dp = torch.einsum("qhd,khd->hqk", grad, wide_v)
    ds = p * (dp - (grad * out).sum(-1).T[..., None]) * scale
    parts = (torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, grad))
    dk, dv = (t.unflatten(1, (-1, 2)).sum(2) for t in parts)
    return torch.einsum("hqk,khd->qhd", ds, wide_k), dk, dv


def scores(q, k, cu_seqlens, cu_keys, scale, window, causal):
    (mine, from_end), (theirs, key_from_end) = (_places(len(t), cu) for t, cu in ((q, cu_seqlens), (k, cu_keys)))
    distance = key_from_end - from_end[:, None]
    seen = (mine[:, None] == theirs) & ((distance >= 0) | (not causal)) & (distance < (window or len(k)))
    return (torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale).masked_fill(~seen, -math.inf)


def _places(count, cu_seqlens):
    """The document of each token, and how far it stands from its end; what lies behind the last is one of its own."""
    at = torch.arange(count)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    return document, torch.cat((cu_seqlens, cu_seqlens.new_tensor([count])))[document + 1] - 1 - at


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ends", [ENDS, torch.tensor([0, 16, 32], dtype=torch.int32)], ids=["packed", "dense"])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_sinks_are_the_formula_s(monkeypatch, backend, ends, window):
    """`varlen` with a stand-in for the GPU's kernel: what is ours is how its output and gradients are changed."""
    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(varlen, "_backward", flash_backward)
    wanted = run("reference", window, Layout.packed(ends, 16, (2, 16)))
    found = run(backend, window, Layout.packed(ends, 16, (2, 16)))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5])
def test_shared_prompts_by_the_packed_kernel(monkeypatch, window):
    """Each segment's keys are gathered, and the kernel writes no gradient for keys that belong to none."""

    def backward(grad, q, k, *rest):
        dq, dk, dv = flash_backward(grad, q, k, *rest)
        nobody = torch.arange(len(k)) >= rest[4][-1]
        assert nobody.any()
        return dq, *(t.masked_fill(nobody[:, None, None], math.nan) for t in (dk, dv))

    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(varlen, "_backward", backward)
    found = []
    for backend in ("reference", "varlen"):
        q, k, v, _ = operands()
        layout = shared_prefix()
        layout.prepare(backend, {window})
        y = attend(q, k, v, layout, backend=backend, window=window)
        found.append((y, *torch.autograd.grad((y * torch.sin(y.detach() * 9)).sum(), (q, k, v))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "layout",
    [
        lambda: Layout.packed(ENDS, 16, (2, 16)),
        shared_prefix,
    ],
    ids=["packed", "shared_prefix"],
)
def test_flex_computes_the_formula(monkeypatch, layout, softcap, window):
    """Uncompiled and without gradients, which it has on a GPU only."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda function: function)
    q, k, v, _ = (t.detach() for t in operands())
    found = []
    for backend in ("reference", "flex"):
        made = layout()
        made.prepare(backend, {window})
        found.append(attend(q, k, v, made, backend=backend, window=window, softcap=softcap))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_which_backend_a_model_gets():
    half, wide, cpu = torch.bfloat16, torch.float32, torch.device("cpu")
    assert choose_backend("auto", CUDA, half) == "varlen" and choose_backend("auto", CUDA, wide) == "sdpa"
    assert choose_backend("auto", cpu, half) == "sdpa"
    assert choose_backend("auto", CUDA, half, softcap=True) == "flex"
    slow = ((cpu, half, False), (CUDA, wide, False), (CUDA, half, True))
    assert {choose_backend("auto", *given, softcap=True, sinks=sinks) for *given, sinks in slow} == {"reference"}
    assert choose_backend("reference", cpu, wide, softcap=True) == "reference"
    for requested in ("sdpa", "varlen"):
        with pytest.raises(UserError, match="cannot cap scores softly"):
            choose_backend(requested, CUDA, half, softcap=True)
    with pytest.raises(UserError, match="needs a CUDA device and dtype bf16"):
        choose_backend("varlen", cpu, half)
    assert choose_backend("flex", CUDA, half, softcap=True) == "flex"
    with pytest.raises(UserError, match="'flex' needs a CUDA device"):
        choose_backend("flex", cpu, half)
    with pytest.raises(UserError, match="'flex' has no attention sinks"):
        choose_backend("flex", CUDA, half, sinks=True)


@pytest.fixture
def t4(monkeypatch):
    """A GPU without bf16, as far as torch's answers go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def test_gpus_without_bf16_take_sdpa(t4, monkeypatch):
    half = torch.bfloat16
    assert choose_backend("auto", CUDA, half) == choose_backend("auto", CUDA, torch.float16) == "sdpa"
    assert choose_backend("auto", CUDA, half, softcap=True) == "reference"
    with pytest.raises(UserError, match=r"'varlen' needs a GPU of compute capability 8\.0 .*this one has 7\.5"):
        choose_backend("varlen", CUDA, half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose_backend("auto", CUDA, half) == "varlen"
    assert without_bf16(torch.device("cpu")) is None and without_bf16(CUDA) is None


def test_a_check_and_env_say_what_such_a_gpu_means(t4, monkeypatch):
    recipe = plugins.load_file(assets.resolve_recipe("full_sft"))
    rows = "data.sources=[{path: ftlib:demo/data/lora_train.jsonl}]"
    cfg = config.load(recipe.Config, ["model.path=ftlib:demo/model", rows])
    with pytest.warns(UserWarning, match=r"bf16 \(8\.0.*emulated.*set dtype=fp32") as caught:
        build.check_model(cfg)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.check_model(replace(cfg, dtype="fp32"))
    gpu = SimpleNamespace(name="Tesla T4", total_memory=1 << 34, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    monkeypatch.setattr(preflight, "available", lambda: ("the GPU", 1 << 34, 1 << 34))
    told = env.facts(None)
    assert any("set dtype=fp32" in line for line in told[told.index(next(t for t in told if "Tesla" in t)) :])


def test_flex_is_not_chosen_where_every_score_has_a_mask():
    """Gathered keys and text diffusion: plain PyTorch would compute, and the log and the estimate would not know."""
    model = SimpleNamespace(arch=SimpleNamespace(softcap=True, sinks=False, head_dims={64}))

    def chosen(asked="auto", **more):
        cfg = SimpleNamespace(model=SimpleNamespace(attention=asked), dtype="bf16", parallel=Parallel(**more))
        return build.backend(cfg, model, CUDA)

    gathered = {"cp": 2, "cp_style": "allgather"}
    assert chosen() == chosen(cp=2, cp_style="ulysses") == "flex" and chosen(**gathered) == "reference"
    with pytest.raises(UserError, match=r"model\.attention, parallel\.cp_style"):
        chosen("flex", **gathered)


def test_what_a_run_says_of_it():
    def said(backend, softcap=False):
        return attention_note(SimpleNamespace(backend=backend, arch=SimpleNamespace(softcap=softcap)))

    assert said("varlen") == ["attention: varlen"]
    assert "scores are capped softly" in said("reference", softcap=True)[0]
    assert attention_note(None) == []


def test_the_packed_kernel_begins_blocks_for_this_batch_alone(monkeypatch):
    """Documents and the longest of the batch, not of any, without compiling anew; outputs and gradients stay."""
    begun = []

    def forward(q, k, v, cu_seqlens, cu_keys, length, *rest):
        begun.append((cu_seqlens.tolist(), cu_keys.tolist(), length))
        return flash_forward(q, k, v, cu_seqlens, cu_keys, length, *rest)

    def backward(grad, q, k, v, out, lse, cu_seqlens, cu_keys, *rest):
        begun.append((cu_seqlens.tolist(), cu_keys.tolist(), rest[2]))
        return flash_backward(grad, q, k, v, out, lse, cu_seqlens, cu_keys, *rest)

    monkeypatch.setattr(varlen, "_forward", forward)
    monkeypatch.setattr(varlen, "_backward", backward)
    monkeypatch.setattr(varlen, "BLOCK", 4)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for rows, bound in (([[9, 5], [4]], 12), ([[2, 11], [3, 3, 3]], 12), ([[16], []], 16)):
        documents = [[(np.arange(n), np.arange(n)) for n in row] for row in rows]
        layout = from_documents(documents, 16, 0, 5).layout.to("cpu", non_blocking=True)
        ends = layout.cu_seqlens.unique().tolist()
        assert layout.extent.tolist() == [len(ends) - 1, max(np.diff(ends))]
        found = []
        for where, function in ((layout, attend), (layout, compiled), (replace(layout, extent=None), attend)):
            q, k, v, _ = operands()
            where.prepare("varlen", {None})
            stance = "fail_on_recompile" if function is compiled and len(begun) > 6 else "default"
            with torch.compiler.set_stance(stance):
                y = function(q, k, v, where, backend="varlen", window=None)
            found.append((y, *torch.autograd.grad((y * torch.sin(y.detach() * 9)).sum(), (q, k, v))))
        assert begun[-6:-2] == [(ends, ends, bound)] * 4 and begun[-1][2] == 16 and len(begun[-1][0]) == 13
        for part in zip(*found, strict=True):
            assert torch.equal(part[0], part[1]) and torch.equal(part[0], part[2])
