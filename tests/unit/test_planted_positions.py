"""Positions that skip, up to the last one of the range, and drawn anew for every row of a run."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny_model import ROOT, train, write_config, write_model, write_rows

from ftlib import plugins
from ftlib.data import positions
from ftlib.layers.batch import IGNORED, from_documents


def batch(rows, tokens=30):
    piece = (np.arange(tokens, dtype=np.int32), np.full(tokens, IGNORED, np.int32))
    return from_documents([[piece]] * rows, tokens, 0, 1)


def test_the_whole_range_is_used_and_no_more():
    found = [positions.skip_positions(batch(1), 32, [seed]).position_ids[0, -1].item() for seed in range(60)]
    assert set(found) == {29, 30, 31}


def test_a_row_jumps_by_its_place_in_the_step_wherever_it_is_computed():
    recipe = plugins.load_file(ROOT / "recipes/pretrain.py")

    def jumps(rank, ranks, micro_rows, step=5):
        cfg = SimpleNamespace(seed=1, batch=SimpleNamespace(rows=8, micro_rows=micro_rows))
        cfg.data, run = SimpleNamespace(seq_len=30), SimpleNamespace(data_rank=rank, data_ranks=ranks)
        count = 8 // ranks // micro_rows
        made = [recipe.skipped(cfg, run, batch(micro_rows), 1000, step, number) for number in range(count)]
        return torch.cat([each.position_ids for each in made])

    whole = jumps(0, 1, 8)
    assert len({tuple(row) for row in whole.tolist()}) == 8
    assert torch.equal(whole, jumps(0, 1, 2)) and torch.equal(whole, torch.cat([jumps(r, 4, 1) for r in range(4)]))
    assert not torch.equal(whole, jumps(0, 1, 8, step=6))


def test_a_run_skips_up_to_the_range_of_its_model(tmp_path, monkeypatch):
    seen, plain, recipe = [], positions.skip_positions, plugins.load_file(ROOT / "recipes/pretrain.py")
    monkeypatch.setattr(recipe, "skip_positions", lambda *words: seen.append(words[1:3]) or plain(*words))
    model, rows = write_model(tmp_path / "model", "qwen3-0.6b"), write_rows(tmp_path / "rows.jsonl", 20)
    file = write_config(tmp_path / "c.yaml", model, rows, steps=2, context={"length": 1024, "skip": True})
    train("pretrain", "--config", file, "batch.micro_rows=1")
    assert [length for length, _ in seen] == [1024] * 8
    assert len({seed for _, seeds in seen for seed in seeds}) == 8
