"""What only a GPU can show: bf16, compiled code and streams against float32 and eager."""

import json

import pytest
import torch
from parity.shrink import shrunk

from ftlib.adapters import lora
from ftlib.adapters.fuse import fuse
from ftlib.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ftlib.kernels.lora_linear import lora_project, lora_project_reference
from ftlib.layers.batch import from_documents
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import families
from ftlib.models.language_model import LanguageModel
from ftlib.parallel import offload
from ftlib.parallel import run as processes
from ftlib.parallel.apply import apply
from ftlib.sections import Memory, Parallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dim", "outs"), [(512, (512, 128, 128)), (512, (1536, 1536)), (1536, (512,))])
def test_fused_projection(dim, outs, compiled):
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g, device="cuda") * scale

    rank, out = 16, sum(outs)
    x = normal(300, dim).bfloat16().requires_grad_()
    a = [normal(rank, dim, scale=dim**-0.5).requires_grad_() for _ in outs]
    b = [normal(o, rank, scale=0.1).requires_grad_() for o in outs]
    stacked = torch.zeros(out + rank * len(outs), dim + rank * len(outs), device="cuda", dtype=torch.bfloat16)
    stacked[:out, :dim] = normal(out, dim, scale=dim**-0.5)
    row = 0
    for i, (low, high) in enumerate(zip(a, b, strict=True)):
        at = slice(i * rank, (i + 1) * rank)
        stacked[out:, :dim][at] = low.detach()
        stacked[row : row + len(high), dim:][:, at] = high.detach()
        row += len(high)

    def run(f, x, stacked):
        y = f(x, stacked, a, b, 2.0)
        return (y, *torch.autograd.grad((y.float() * torch.sin(y.detach().float())).sum(), (x, *a, *b)))

    project = torch.compile(lora_project, fullgraph=True) if compiled else lora_project
    ours = run(project, x, stacked)
    exact = run(lora_project_reference, x.detach().double().requires_grad_(), stacked.double())
    assert max(error(o, e) for o, e in zip(ours, exact, strict=True)) < 2e-2


@pytest.mark.parametrize("dim", [1, 100, 4096])
def test_embedding_in_host_memory(dim):
    from ftlib.kernels.host_embedding import host_embedding, host_embedding_reference

    table = torch.randn(777, dim, dtype=torch.bfloat16).pin_memory()
    ids = torch.randint(0, 777, (3, 50), device="cuda")
    assert torch.equal(host_embedding(ids, table), host_embedding_reference(ids, table))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_head_in_bf16(softcap, weighted):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(700, 256, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = (0.2 * torch.randn(5003, 256, generator=g, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, 5003, (700,), generator=g, device="cuda")
    labels[::3] = -100
    targets = int((labels != -100).sum())
    terms = {"weights": 3 * torch.rand(700, generator=g, device="cuda") if weighted else None, "softcap": softcap}
    loss = linear_cross_entropy(hidden, weight, labels, targets=targets, **terms)
    got = torch.autograd.grad(loss, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy_reference(*exact, labels, **terms)
    want = torch.autograd.grad(expected, exact)
    assert abs(loss.item() - expected.item()) < 2e-3 * expected.item()
    assert max(error(o, e) for o, e in zip(got, want, strict=True)) < 2e-2


def step(memory: Memory, dtype: torch.dtype):
    """Loss and gradients of one packed step of a small Qwen3 with adapters."""
    config = shrunk("qwen3-0.6b", hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=1000)
    config |= {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    arch, table = families.read(json.loads(json.dumps(config)))
    torch.manual_seed(0)
    model = LanguageModel(arch, table, config).to("cuda", dtype)
    model.model.init_weights(0)
    lora.attach(model, "all-linear", rank=8, alpha=16)
    lora.reset(model, 0)
    g = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.05, generator=g)
    apply(model, processes.start(Parallel(), 0), memory, dtype)
    if dtype is torch.bfloat16:
        assert fuse(model) == 16
    if memory.offload:
        offload.attach(model)
        model.model.saving.__closure__[0].cell_contents.smallest = 1 << 12
    ids = torch.randint(3, 1000, (2, 1024), generator=torch.Generator().manual_seed(2)).numpy()
    documents = [[(ids[r, :700], ids[r, 1:701]), (ids[r, 700:1000], ids[r, 701:1001])] for r in range(2)]
    batch = from_documents(documents, 1024, 0, 2).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        model.zero_grad()
        loss = next_token_loss(model(batch), model.lm_head.weight, batch.labels, batch.target_tokens)
        (loss / batch.target_tokens).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item() / batch.target_tokens, gradients


@pytest.mark.parametrize("tile", [0, 300])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "except_attention", "full"])
def test_every_memory_setting_gives_the_same_step(recompute, compiled, offloaded, tile):
    exact_loss, exact = step(Memory(recompute="none", compile=False), torch.float32)
    memory = Memory(recompute=recompute, compile=compiled, offload=offloaded, tiled_mlp=tile)
    loss, gradients = step(memory, torch.bfloat16)
    assert abs(loss - exact_loss) < 5e-3 * exact_loss
    assert error(gradients, exact) < 5e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(8, 2, 64, None), (4, 4, 128, 37), (6, 1, 64, 5)]
)
def test_packed_attention(heads, kv_heads, head_dim, window, compiled):
    from ftlib.layers.attention import attend
    from ftlib.layers.batch import Layout

    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 300, h, head_dim, generator=g, device="cuda").bfloat16().requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    ends = torch.tensor([0, 1, 130, 300, 333, 600, 600, 600], dtype=torch.int32, device="cuda")

    def run(backend, *operands):
        layout = Layout.packed(ends, 300, (2, 300))
        layout.prepare(backend, {window})
        call = torch.compile(attend, fullgraph=True) if compiled and backend == "varlen" else attend
        y = call(*operands, layout, backend=backend, window=window)
        return (y, *torch.autograd.grad((y.float() * torch.sin(y.detach().float())).sum(), operands))

    ours = run("varlen", q, k, v)
    exact = run("reference", *(t.detach().double().requires_grad_() for t in (q, k, v)))
    assert max(error(o, e) for o, e in zip(ours, exact, strict=True)) < 2e-2
