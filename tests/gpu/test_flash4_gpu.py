"""FlashAttention-4 on a GPU against the plain formula in float32; skipped where its package does not work."""

import json

import pytest
import torch

from ftlib.kernels.flash4_attention import flash4_attention, flash4_refusal
from ftlib.layers.attention import attend, attend_masked
from ftlib.layers.batch import Batch, Layout
from ftlib.models import load
from ftlib.parallel import recompute
from ftlib.sections import Memory

MISSING = flash4_refusal(torch.device("cuda"), False, ())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
ENDS = {"packed": [0, 300, 512, 700, 1024, 1024], "dense": [0, 512, 1024], "many": [0, 300, 512, 700, *[1024] * 300]}


def distance(ours, exact):
    return float((ours.detach().float() - exact.detach()).norm() / exact.norm())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("dim", "kv_heads", "ends", "window", "more"),
    [
        (128, 2, "packed", None, None),
        (128, 2, "dense", None, None),
        (128, 2, "packed", 100, None),
        (128, 2, "dense", 100, None),
        (128, 2, "many", None, None),
        (64, 2, "packed", None, None),
        (64, 2, "dense", None, None),
        (128, 8, "packed", None, None),
        (128, 2, "packed", None, "sinks"),
        (128, 2, "packed", None, "softcap"),
    ],
)
def test_output_and_gradients(dim, kv_heads, ends, window, more, compiled):
    g = torch.Generator("cuda").manual_seed(0)
    ends = torch.tensor(ENDS[ends], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(2, 512, heads, dim, generator=g, device="cuda") for heads in (8, kv_heads, kv_heads))
    inputs = (q, k, v, torch.randn(8, generator=g, device="cuda"))[: 4 if more == "sinks" else 3]
    weight = torch.sin(3 * q)

    def run(backend, dtype):
        layout = Layout.packed(ends, 512, (2, 512))
        layout.prepare(backend, {window})
        parts = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        function = torch.compile(attend, fullgraph=True) if compiled and backend != "reference" else attend
        terms = {"sinks": parts[3]} if more == "sinks" else {"softcap": 3.0 if more == "softcap" else None}
        y = function(*parts[:3], layout, backend=backend, window=window, **terms)
        return y, *torch.autograd.grad((y.float() * weight).sum(), parts)

    for ours, exact in zip(run("flash4", torch.bfloat16), run("reference", torch.float32), strict=True):
        assert distance(ours, exact) < 2e-2


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("ends", ["dense", "packed", "many"])
def test_equal_bits(deterministic, kv_heads, window, ends):
    """Where torch is told to be deterministic, backward gives the same bits each time, and the right ones."""
    g = torch.Generator("cuda").manual_seed(0)
    lie = {"dense": [0, 4096, 8192], "packed": [0, 900, 4096, 4200, 8192, 8192], "many": [*range(0, 8192, 64), 8192]}
    ends = torch.tensor(lie[ends], dtype=torch.int32, device="cuda")
    inputs = [torch.randn(2, 4096, heads, 128, generator=g, device="cuda") for heads in (8, kv_heads, kv_heads)]
    weight = torch.sin(3 * inputs[0])

    def run(backend, dtype):
        layout = Layout.packed(ends, 4096, (2, 4096))
        layout.prepare(backend, {window})
        parts = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        y = attend(*parts, layout, backend=backend, window=window)
        return y, *torch.autograd.grad((y.float() * weight).sum(), parts)

    once = run("flash4", torch.bfloat16)
    for _ in range(4):
        assert all(map(torch.equal, once, run("flash4", torch.bfloat16)))
    for ours, exact in zip(once, run("reference", torch.float32), strict=True):
        assert distance(ours, exact) < 2e-2


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("bits", [False, True], ids=["any_order", "equal_bits"])
def test_more_keys_than_queries(window, bits, request):
    """As shared prompts and gathered keys have them: a document without queries, and keys of no document."""
    if bits:
        request.getfixturevalue("deterministic")
    g = torch.Generator("cuda").manual_seed(0)
    queries, keys = (torch.tensor(e, dtype=torch.int32, device="cuda") for e in ([0, 90, 90, 300], [0, 150, 260, 600]))
    q, k, v = (torch.randn(n, h, 128, generator=g, device="cuda") for n, h in ((300, 8), (640, 2), (640, 2)))
    inputs, scale = [t.requires_grad_() for t in (q, k, v)], 128**-0.5

    def gradients(y):
        return y, *torch.autograd.grad((y.float() * torch.sin(3 * q)).sum(), inputs)

    def ours():
        return gradients(flash4_attention(*(t.bfloat16() for t in inputs), queries, 400, scale, window, None, keys))

    found = ours()
    assert not bits or all(map(torch.equal, found, ours()))
    (mine, left), (theirs, left_keys) = (places(ends, n) for ends, n in ((queries, 300), (keys, 640)))
    before = left[:, None] - left_keys
    seen = (mine[:, None] == theirs) & (before <= 0) & (before > -(window or 640))
    wanted = gradients(attend_masked(*(t[None] for t in inputs), seen[None, None], "reference", scale, None, None)[0])
    for ours, exact in zip(found, wanted, strict=True):
        assert distance(ours, exact) < 2e-2
    assert all(not t[600:].any() for t in found[2:])


def places(ends, count):
    """The document of each token, and how many tokens of it are left."""
    at = torch.arange(count, device="cuda")
    document = torch.searchsorted(ends[1:].contiguous(), at, right=True)
    return document, torch.cat((ends, ends.new_tensor([count])))[document + 1] - at


@pytest.mark.parametrize("mode", ["none", "full", "except_attention"])
def test_a_model(tmp_path, mode):
    """Loss and gradients of compiled blocks are those of `sdpa`, whatever backward computes again."""
    config = {
        "model_type": "qwen3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    device, ends = torch.device("cuda"), torch.tensor(ENDS["packed"], dtype=torch.int32, device="cuda")
    g = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, 512, (2, 512), generator=g, device=device)
    positions = torch.cat([torch.arange(int(n)) for n in ends.diff()]).view(2, 512).to(device)
    found = []
    for backend in ("sdpa", "flash4"):
        model = load.build(tmp_path, torch.bfloat16).to_empty(device=device)
        model.tie()
        model.model.init_weights(0)
        model.model.use_attention(backend)
        recompute.use(model, Memory(recompute=mode), device)
        batch = Batch(ids, ids.roll(-1, 1), positions, Layout.packed(ends, 512, (2, 512)), target_tokens=1024)
        logits = model(batch) @ model.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (wanted, theirs), (loss, ours) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-3)
    for name, grad in ours.items():
        assert distance(grad, theirs[name].float()) < 4e-2, name
