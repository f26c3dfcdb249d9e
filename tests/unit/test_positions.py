"""Positions that skip, and a range made longer."""

import json

import numpy as np
import pytest
import torch
from parity.shrink import published, reference, relative, shrunk
from tiny_model import losses, train, write_config, write_model, write_rows

from ftlib import models
from ftlib.data.positions import skip_positions
from ftlib.errors import UserError
from ftlib.layers.batch import IGNORED, from_documents
from ftlib.models.sizes import extended, write
from ftlib.sections.sizes import Context, Sizes


def batch(*lengths, seq_len=64):
    rows = [[(np.arange(n, dtype=np.int32), np.full(n, IGNORED, np.int32)) for n in lengths]]
    return from_documents(rows, seq_len, 0, len(lengths))


def test_each_document_jumps_once_and_stays_below_the_range():
    start, jumps, cuts = batch(30, 20, 1), [], []
    for seed in range(300):
        found = skip_positions(start, 1000, [seed]).position_ids[0]
        for first, stop in ((0, 30), (30, 50)):
            own = found[first:stop]
            steps = own.diff()
            assert own[0] == 0 and own.max() < 1000 and (steps >= 1).all()
            far = (steps > 1).nonzero()[:, 0]
            assert len(far) <= 1
            if first == 0 and len(far):
                jumps.append(int(own[-1])), cuts.append(int(far[0]))
        assert found[50] == 0
    assert np.quantile(jumps, [0.1, 0.5, 0.9]) == pytest.approx([120, 515, 905], abs=80)  # uniform over the range
    assert min(cuts) <= 2 and max(cuts) >= 26
    assert torch.equal(start.position_ids, batch(30, 20, 1).position_ids), "the batch itself is left as it was"


def test_nothing_moves_where_the_range_is_the_document():
    assert torch.equal(skip_positions(batch(64), 64, [1]).position_ids, batch(64).position_ids)


def test_a_row_that_is_not_packed_jumps_as_a_whole_one_does():
    for seed in range(20):
        whole = skip_positions(batch(30, seq_len=64), 1000, [seed]).position_ids
        narrow = skip_positions(batch(30, seq_len=32), 1000, [seed], 64).position_ids
        assert torch.equal(whole[:, :30], narrow[:, :30])


def test_extended_is_what_transformers_makes_of_the_same_settings(tmp_path):
    config = shrunk("qwen3-0.6b") | {"max_position_embeddings": 32}
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = write(tmp_path, tmp_path / "out", Sizes(), Context(length=128), weights=True)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours, ids = models.from_pretrained(folder), torch.randint(3, 150, (1, 100))
    with torch.no_grad():
        assert relative(ours.logits(ids), theirs(ids).logits) < 1e-5
        assert relative(ours.logits(ids), models.from_pretrained(tmp_path).logits(ids)) > 1e-3


def test_what_cannot_be_extended_is_named():
    for config, length, words in [
        (published("qwen3-0.6b"), 1000, "range is 40960"),
        (published("llama-3.1-8b"), 10**6, "scaled already"),
    ]:
        with pytest.raises(UserError, match=words):
            extended(config, length)


def test_a_run_that_skips(tmp_path):
    model, rows = write_model(tmp_path / "model", "qwen3-0.6b"), write_rows(tmp_path / "rows.jsonl", 40)
    file = write_config(tmp_path / "c.yaml", model, rows, steps=3, from_scratch=False, context={"length": 1024})
    plain = train("pretrain", "--config", file, f"output_dir={tmp_path}/a")
    on = ("--config", file, f"output_dir={tmp_path}/b", "context.skip=true", "batch.micro_rows=1")
    skipped = losses(train("pretrain", *on))
    assert skipped[0] != losses(plain)[0]
    final = json.loads((tmp_path / "b" / "final" / "config.json").read_text())
    assert final["max_position_embeddings"] == 1024 and final["rope_scaling"]["factor"] == 2.0
    with pytest.raises(UserError, match=r"other settings:\n    context\.skip: True then, False now\n"):
        train("pretrain", *on, "context.skip=false", "steps=4")
    assert losses(train("pretrain", *on, "steps=4"))[:3] == skipped
