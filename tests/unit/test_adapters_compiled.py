"""Every kind of adapter inside compiled blocks (`memory.compile`): one graph, and the numbers of the eager model."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora
from ftlib.parallel import recompute
from ftlib.sections import Memory

X = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))
SAVED = ("lm_head", "input_layernorm", "q_norm")  # two of them inside the blocks
KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "pissa-rslora": {"init": "pissa", "rslora": True},
    "saved": {"modules_to_save": SAVED},
    "dora-dropout-saved": {"dora": True, "dropout": 0.2, "modules_to_save": SAVED},
}
OFTEN = "dora-dropout-saved"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    config = shrunk("qwen3-0.6b", num_hidden_layers=2)
    reference(config).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config))
    return path


def adapted(folder, options):
    model = models.from_pretrained(folder)
    lora.attach(model, ("q_proj", "down_proj"), rank=2, alpha=4.0, **options)
    lora.reset(model, 0)
    with torch.no_grad():
        for _, _, factors in lora.adapted(model):
            factors.lora_B.add_(0.05 * torch.randn(factors.lora_B.shape, generator=torch.Generator().manual_seed(1)))
    return model.train()


def run(model):
    """Logits and the gradients of everything that trains, twice, as a step changes what was compiled for."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        logits = model.logits(X)
        logits.log_softmax(-1)[..., 7].mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        found += [logits.detach(), *(p.grad.clone() for p in trained)]
        with torch.no_grad():
            for p in trained:
                p -= 0.3 * p.grad
                p.grad = None
    with torch.no_grad(), lora.use(model, None):
        return [*found, model.logits(X)]


@pytest.mark.parametrize("kind", [k if k == OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_compiled_equals_eager(folder, monkeypatch, kind):
    """Traced by the compiler, run by eager kernels: what inductor makes of it is the GPU tests' business."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    wanted = run(adapted(folder, KINDS[kind]))
    model = adapted(folder, KINDS[kind])
    recompute.use(model, Memory(recompute="none", compile=True), torch.device("cpu"))
    for ours, theirs in zip(run(model), wanted, strict=True):
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "saved"])
def test_inductor_on_a_cpu_equals_eager(folder, kind):
    torch._dynamo.reset()
    wanted = run(adapted(folder, KINDS[kind]))
    model = adapted(folder, KINDS[kind])
    recompute.use(model, Memory(recompute="full", compile=True), torch.device("cpu"))
    for ours, theirs in zip(run(model), wanted, strict=True):
        assert relative(ours, theirs) <= 1e-4
