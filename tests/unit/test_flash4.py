"""FlashAttention-4 without its package: a stand-in with the same functions shows that what we hand it and make of its
answers is right, eager and compiled; and who is told to take another backend."""

import json
import math
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import relative
from tiny_model import ROOT
from torch.profiler import ProfilerActivity, profile
from unit.test_attention_backends import CUDA, ENDS, _places, operands, shared_prefix

from ftlib import build
from ftlib.errors import UserError
from ftlib.kernels import flash4_attention
from ftlib.layers.attention import attend, choose_backend
from ftlib.layers.batch import Batch, Layout
from ftlib.models import initial, load
from ftlib.models.decoder import Decoder
from ftlib.parallel import recompute
from ftlib.sections import Memory, Parallel

DENSE = torch.tensor([0, 16, 32], dtype=torch.int32)


class StandIn:
    """`flash_attn.cute.interface` of flash-attn-4 4.0.0b36: names, order and layouts of what we use of it."""

    @staticmethod
    def _flash_attn_fwd(q, k, v, *, return_lse, **terms):
        weights, _ = StandIn._scores(q, k, **terms)
        lse = weights.logsumexp(-1)
        wide = StandIn._flat(v).repeat_interleave(q.shape[-2] // v.shape[-2], 1)
        out = torch.einsum("hqk,khd->qhd", (weights - lse[..., None]).exp(), wide)
        assert return_lse
        return out.reshape(q.shape).contiguous(), StandIn._by_rows(lse, q), None, None, None

    @staticmethod
    def _flash_attn_bwd(q, k, v, out, dout, lse, *, deterministic, **terms):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert all(t.is_contiguous() for t in (q, k, v, out, dout, lse)) and out.shape == dout.shape == q.shape
        weights, slope = StandIn._scores(q, k, **terms)
        groups = q.shape[-2] // k.shape[-2]
        if q.dim() == 4:
            assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
            lse = lse.transpose(0, 1).flatten(1)
        p = (weights - lse[..., None]).exp()
        flat_q, flat_out, grad = (StandIn._flat(t) for t in (q, out, dout))
        wide_k, wide_v = (StandIn._flat(t).repeat_interleave(groups, 1) for t in (k, v))
        dp = torch.einsum("qhd,khd->hqk", grad, wide_v)
        ds = p * (dp - (grad * flat_out).sum(-1).T[..., None]) * slope * terms["softmax_scale"]
        parts = (torch.einsum("hqk,qhd->khd", ds, flat_q), torch.einsum("hqk,qhd->khd", p, grad))
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2).reshape(k.shape) for t in parts)
        if terms.get("cu_seqlens_k") is not None:  # memory as it was
            nobody = torch.arange(len(k)) >= terms["cu_seqlens_k"][-1]
            dk, dv = (t.masked_fill(nobody[:, None, None], math.nan) for t in (dk, dv))
        dq = torch.einsum("hqk,khd->qhd", ds, wide_k).reshape(q.shape)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    @staticmethod
    def _scores(
        q, k, *, softmax_scale, causal, softcap, window_size_left=None, window_size_right=None, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # fmt: skip
        """Scores [heads, N, S], and the slope of the cap."""
        packed = cu_seqlens_q is not None
        assert causal and q.is_contiguous() and k.is_contiguous() and q.dim() == (3 if packed else 4)
        if packed:
            assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q.shape == cu_seqlens_k.shape
            assert cu_seqlens_q.diff().max() <= max_seqlen_q
            assert max_seqlen_k is None or cu_seqlens_k.diff().max() <= max_seqlen_k
        else:
            cu_seqlens_q = cu_seqlens_k = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1])
        flat_q, wide_k = StandIn._flat(q), StandIn._flat(k).repeat_interleave(q.shape[-2] // k.shape[-2], 1)
        (mine, last), (theirs, last_key) = _places(len(flat_q), cu_seqlens_q), _places(len(wide_k), cu_seqlens_k)
        distance = last_key - last[:, None]
        seen = (mine[:, None] == theirs) & (distance >= 0)
        if window_size_left is not None:
            assert window_size_right == 0
            seen &= distance <= window_size_left
        scores, slope = torch.einsum("qhd,khd->hqk", flat_q, wide_k) * softmax_scale, 1.0
        if softcap:
            slope = 1 - torch.tanh(scores / softcap) ** 2
            scores = softcap * torch.tanh(scores / softcap)
        return scores.masked_fill(~seen, -math.inf), slope

    @staticmethod
    def _flat(x):
        return x.flatten(0, -3)

    @staticmethod
    def _by_rows(lse, q):
        return lse if q.dim() == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flash4_attention, "package", lambda: StandIn)


def gradients(backend, layout, inputs, function=attend, **terms):
    layout.prepare(backend, {terms.get("window")})
    y = function(*inputs[:3], layout, backend=backend, **({"window": None} | terms))
    return y, *torch.autograd.grad((y * torch.sin(y.detach() * 9)).sum(), inputs)


@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "layout",
    [lambda: Layout.packed(ENDS, 16, (2, 16)), lambda: Layout.packed(DENSE, 16, (2, 16)), shared_prefix],
    ids=["packed", "dense", "shared_prefix"],
)
def test_output_and_gradients(stand_in, layout, window, softcap, sunk):
    inputs = operands()[: 3 + sunk]
    terms = {"window": window, "softcap": softcap, "sinks": inputs[3] if sunk else None, "scale": 0.4}
    found = gradients("flash4", layout(), inputs, **terms)
    for ours, exact in zip(found, gradients("reference", layout(), inputs, **terms), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_backward_is_told_that_a_run_is_deterministic(stand_in):
    """The stand-in compares what it hears with the switch, which nothing else here turns on."""
    torch.use_deterministic_algorithms(True)
    try:
        gradients("flash4", Layout.packed(ENDS, 16, (2, 16)), operands()[:3], scale=0.4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ends", [ENDS, DENSE], ids=["packed", "dense"])
def test_whole_rows_are_no_documents(monkeypatch, ends):
    """Rows that are one document each go to the kernels that need no list of documents."""
    told = []

    class Spy(StandIn):
        @staticmethod
        def _flash_attn_fwd(q, k, v, **terms):
            told.append("cu_seqlens_q" in terms)
            return StandIn._flash_attn_fwd(q, k, v, **terms)

    monkeypatch.setattr(flash4_attention, "package", lambda: Spy)
    gradients("flash4", Layout.packed(ends, 16, (2, 16)), operands()[:3])
    assert told == [ends is ENDS]


@pytest.mark.parametrize(("backend", "taken"), [("flash4", "flash4"), ("flex", "flex"), ("varlen", "reference")])
def test_a_model_with_capped_scores_keeps_it(backend, taken):
    model = SimpleNamespace(arch=SimpleNamespace(softcap=True), layers=[])
    Decoder.use_attention(model, backend)
    assert model.backend == taken


@pytest.mark.parametrize("ends", [ENDS, None], ids=["packed", "dense"])
def test_what_the_operators_promise(stand_in, ends):
    """Shapes, dtypes and strides without data, gradients in compiled code, nothing changed in place."""
    q, k, v, sinks = (t.detach().float().requires_grad_() for t in operands())
    if ends is not None:
        q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v))
    constants = (ends, None, 16, 0.4, 5, 2.0)
    torch.library.opcheck(torch.ops.ftlib.flash4_attention.default, (q, k, v, sinks, *constants))
    q, k, v, sinks = (t.detach() for t in (q, k, v, sinks))
    out, lse = torch.ops.ftlib.flash4_attention(q, k, v, sinks, *constants)
    torch.library.opcheck(torch.ops.ftlib.flash4_attention_backward.default, (out, q, k, v, out, lse, *constants))


@pytest.mark.parametrize("ends", [ENDS, DENSE], ids=["packed", "dense"])
def test_compiled_without_a_break(stand_in, ends):
    """Queries, keys and values that are slices of one product, as fused projections give them."""
    fused = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def block(fused, layout):
        q, k, v = fused.split((4, 2, 2), 2)
        return attend(q, k, v, layout, backend="flash4", window=5).square()

    def run(function):
        layout = Layout.packed(ends, 16, (2, 16))
        layout.prepare("flash4", {5})
        y = function(fused, layout)
        return y, *torch.autograd.grad(y.sum(), fused)

    compiled = run(torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition"))
    torch.testing.assert_close(compiled, run(block))


@pytest.mark.parametrize(("mode", "times"), [("full", 2), ("except_attention", 1)])
def test_a_model_with_recompute(stand_in, monkeypatch, tmp_path, mode, times):
    """Gradients are those of `sdpa`; backward repeats the kernel where it is to."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch._dynamo.reset()
    config = json.loads((ROOT / "tests/parity/configs/qwen3-0.6b.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    generator = torch.Generator().manual_seed(0)
    ids, weight = torch.randint(0, 64, (2, 16), generator=generator), torch.randn(2, 16, 64, generator=generator)
    found = []
    for backend in ("flash4", "sdpa"):
        model = load.build(tmp_path, torch.float32).to_empty(device="cpu")
        model.tie()
        initial.init_weights(model, 0, None, True)
        model.model.use_attention(backend)
        recompute.use(model, Memory(recompute=mode, compile=backend == "flash4"), torch.device("cpu"))
        positions = torch.tensor([[*range(9), *range(7)], [*range(4), *range(12)]])
        for _ in range(2):  # compiled, then seen
            model.zero_grad()
            batch = Batch(ids, ids, positions, Layout.packed(ENDS, 16, (2, 16)), target_tokens=32)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                (model(batch) * weight).sum().backward()
        called = Counter(event.name for event in seen.events())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if backend == "flash4":
            assert called["ftlib::flash4_attention"] == times and called["ftlib::flash4_attention_backward"] == 1
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert max(relative(ours[name], grad) for name, grad in theirs.items()) < 1e-4


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of the kind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("given", "capability", "words"),
    [
        ((torch.device("cpu"), HALF), (9, 0), "needs a CUDA device and dtype bf16"),
        ((CUDA, torch.float32), (9, 0), "needs a CUDA device and dtype bf16"),
        ((CUDA, HALF, False, False, {64, 256}), (9, 0), "up to 128 channels.*some of 256.*use auto, sdpa or reference"),
        ((CUDA, HALF, True, False, {256}), (9, 0), "up to 128 channels.*use auto or reference"),
        ((CUDA, HALF, False, False, {68}), (9, 0), "multiples of 8, and this model has some of 68"),
        ((CUDA, HALF), (8, 0), r"capability 9\.0 \(Hopper\) or newer, and this one has 8\.0"),
        ((CUDA, HALF, True), (12, 0), r"cannot cap scores softly on a GPU of compute capability 12\.0"),
    ],
)
def test_who_is_told_to_take_another(stand_in, hopper, monkeypatch, given, capability, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"(?s)'flash4' .*{words}"):
        choose_backend("flash4", *given)


def test_the_package_is_imported_when_asked_for(hopper, monkeypatch, tmp_path):
    flash4_attention.package.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as where it is missing
    with pytest.raises(UserError, match=r'(?s)package flash-attn-4.*pip install "ftlib\[flash4\]", or use auto'):
        choose_backend("flash4", CUDA, HALF, False, True, {64, 128})
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/interface.py").write_text("_flash_attn_fwd = _flash_attn_bwd = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_backend("flash4", CUDA, HALF, False, True, {64, 128}) == "flash4"
    assert choose_backend("flash4", CUDA, HALF, True) == "flash4"
    assert choose_backend("auto", CUDA, HALF, False, False, {64}) == "flash4"
    assert {choose_backend("auto", CUDA, HALF, False, False, {64, dim}) for dim in (96, 256)} == {"varlen"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))  # where it was not measured
    assert choose_backend("auto", CUDA, HALF, True, False, {64}) == "flex"
    flash4_attention.package.cache_clear()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parallel": Parallel(cp=2, cp_style="ring")}, r"(?s)whole rows.*or cp_style=ulysses"),
        ({"diffusion": None}, r"model\.attention, diffusion"),
        ({"deterministic": True}, r"any order on this GPU.*\n.*model\.attention, deterministic"),
    ],
)
def test_runs_it_cannot_serve(stand_in, hopper, monkeypatch, more, words):
    arch = SimpleNamespace(softcap=False, sinks=False, head_dims={64})

    def chosen(asked="flash4", **more):
        terms = {"model": SimpleNamespace(attention=asked), "dtype": "bf16", "parallel": Parallel()}
        return build.backend(SimpleNamespace(**(terms | more)), SimpleNamespace(arch=arch), CUDA)

    assert chosen() == "flash4" and chosen(parallel=Parallel(cp=2, cp_style="allgather")) == "flash4"
    for capability in (10, 0), (9, 0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert chosen(deterministic=True) == "flash4"
    fits = "deterministic" in more
    assert chosen("auto", **more) == ("flash4" if fits else "varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert chosen("auto", **more) == "varlen"
    with pytest.raises(UserError, match=words):
        chosen(**more)
