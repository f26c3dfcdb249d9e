"""`memory.cuda_graph` on a GPU: the same losses and gradients as without, packed and whole rows, adapters and all."""

import gc
import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import published

from ftlib import build, optim
from ftlib.data.documents import Documents
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models.load import base_state
from ftlib.parallel import graphs
from ftlib.parallel import run as processes
from ftlib.sections import Lora, Loss, Memory, Model, Optim, Parallel, Train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS, LENGTH, STEPS, MICRO = 2, 512, 3, 3
EIGHT = {"fp8": "tensorwise", "fp8_smallest": 64}


def batches(packed):
    """Micro-batches of documents whose number and length differ from one to the next: the second of a step records."""
    dice = torch.Generator().manual_seed(0)
    if not packed:
        ends = torch.arange(0, (ROWS + 1) * LENGTH, LENGTH, dtype=torch.int32)
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        for _ in range(MICRO * STEPS):
            ids = torch.randint(1000, (ROWS, LENGTH), generator=dice)
            yield Batch(ids, ids, positions, Layout.packed(ends, LENGTH, (ROWS, LENGTH)), ids.numel()).to("cuda")
        return
    for number in range(MICRO * STEPS):
        few, many = ((LENGTH - 100 - number, 100 + number), (300, 212 - number)), ((103,) * 4 + (100,), (128,) * 4)
        rows = many if number % 2 else few
        ids = [torch.randint(1000, (length,), generator=dice).numpy() for row in rows for length in row]
        held = Documents.from_rows([(one, one >= 0) for one in ids])
        places = iter(range(len(ids)))
        yield held.batch([[next(places) for _ in row] for row in rows], LENGTH, 0, 16).to("cuda")


def trained(folder, packed, cuda_graph, model=(), recompute="none", compile="auto", **method):
    """Losses and gradient norms of some steps; the model."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    cfg = SimpleNamespace(
        model=Model(path=str(folder), **dict(model)), **method or {"lora": Lora(rank=8)},
        memory=Memory(recompute=recompute, compile=compile, cuda_graph=cuda_graph),
        batch=SimpleNamespace(rows=MICRO * ROWS, micro_rows=ROWS), data=SimpleNamespace(seq_len=LENGTH), loss=Loss(),
        parallel=Parallel(), optim=Optim(lr=1e-3), from_scratch=True, dtype="bf16", seed=0, output_dir=folder,
    )  # fmt: skip
    run = processes.start(cfg.parallel, cfg.seed)
    model = build.model(cfg, run)
    fill_quantized(model)
    optimizer, found = optim.build(model, cfg.optim), []
    stream = batches(packed)
    for _ in range(STEPS):
        loss = 0.0
        for batch in islice(stream, MICRO):
            hidden, head = model(batch), model.lm_head.weight
            part = next_token_loss(hidden, head, batch.labels, batch.target_tokens, **model.logit_terms)
            (part / (MICRO * ROWS * LENGTH)).backward()
            loss += part.item()
        with torch.no_grad():
            model(batch)  # an evaluation in between
        found.append((loss, optim.step(optimizer, 1.0).item()))
    return torch.tensor(found, dtype=torch.float64), model


def fill_quantized(model):
    """A model drawn from nothing draws plain matrices only."""
    dice = torch.Generator("cuda").manual_seed(1)
    for held in base_state(model).values():
        if not isinstance(held, torch.Tensor):
            held.fill(torch.randn(held.shape, generator=dice, device="cuda", dtype=held.dtype) * 0.02)


CASES = {
    "lora": (True, {}),
    "lora, whole rows": (False, {}),
    "recomputed": (True, {"recompute": "selective"}),
    "eager, recomputed": (True, {"recompute": "full", "compile": False}),
    "every weight": (True, {"train": Train()}),
    "nf4": (True, {"model": {"quantize": "nf4"}}),
    "fp8": (True, {"model": EIGHT}),
    "flash4": (True, {"model": {"attention": "flash4"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_with_graphs(case, tmp_path):
    if case == "flash4":
        pytest.importorskip("flash_attn.cute")
    packed, settings = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(published("qwen3-0.6b") | {"num_hidden_layers": 2}))
    torch.cuda.reset_peak_memory_stats()
    plain = trained(tmp_path, packed, False, **settings)[0]
    gc.collect()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found, model = trained(tmp_path, packed, True, **settings)
    blocks = model.model.blocks
    assert blocks.record.unseen > 0 and len(blocks.passes) == (2 if packed and case != "flash4" else 1)
    torch.testing.assert_close(found[:, 0], plain[:, 0], rtol=2e-3, atol=0)
    torch.testing.assert_close(found[:, 1], plain[:, 1], rtol=3e-2, atol=0)
    assert graphs.peak(model) < 1.5 * most, "what was recorded counts once"
