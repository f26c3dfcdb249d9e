"""`memory.budget_gib` on a GPU: a real trial, and a step that stays below."""

import json
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import published

from ftlib import build
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.parallel import run as processes
from ftlib.sections import Loss, Memory, Model, Optim, Parallel, Train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS, LENGTH = 4, 2048


def step(folder, budget):
    """(the note, peak GiB) of a full fine-tune's step of twelve layers."""
    torch.cuda.empty_cache()
    cfg = SimpleNamespace(
        model=Model(path=str(folder)),
        train=Train(only=("layers",)),
        memory=Memory(budget_gib=budget),
        batch=SimpleNamespace(rows=ROWS, micro_rows=ROWS),
        data=SimpleNamespace(seq_len=LENGTH),
        loss=Loss(),
        parallel=Parallel(),
        optim=Optim(lr=1e-4),
        from_scratch=True,
        dtype="bf16",
        seed=0,
        output_dir=folder / str(budget),
    )
    run = processes.start(cfg.parallel, cfg.seed)
    model = build.model(cfg, run)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(1000, (ROWS, LENGTH), device="cuda")
    ends = torch.arange(0, 2 * ROWS + 1, device="cuda", dtype=torch.int32) * (LENGTH // 2)
    positions = torch.arange(LENGTH, device="cuda").expand(ROWS, LENGTH)
    for _ in range(2):
        model.zero_grad()
        batch = Batch(ids, ids, positions, Layout.packed(ends, LENGTH, (ROWS, LENGTH)), ids.numel())
        loss = next_token_loss(model(batch), model.lm_head.weight, ids, ids.numel(), **model.logit_terms)
        (loss / ids.numel()).backward()
    return model.memory_note, torch.cuda.max_memory_allocated() / 2**30


def test_a_step_stays_below_its_budget(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published("qwen3-0.6b") | {"num_hidden_layers": 12}))
    note, most = step(tmp_path, "auto")
    assert "recompute none" in note
    for share in (0.8, 0.6):
        note, peak = step(tmp_path, round(share * most, 2))
        assert not note.startswith("memory: recompute none")
        assert peak <= share * most + 0.05, note
    kept = json.loads((tmp_path / str(round(0.6 * most, 2)) / "memory.json").read_text())
    assert kept["memory"]["budget_gib"] is None and kept["note"] == note
    again, peak = step(tmp_path, round(0.6 * most, 2))
    assert again.startswith(note) and "as before" in again and peak <= 0.6 * most + 0.05
