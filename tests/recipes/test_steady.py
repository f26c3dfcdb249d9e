"""Compiled blocks (`memory.compile`) are compiled for the first steps only, whatever the rows hold."""

import json
import random
from functools import partial

import pytest
import torch
from tiny_model import train
from torch._dynamo.utils import counters

from ftlib.observe.output import Output
from ftlib.parallel import recompute


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs there were after each step; captured as ever, but run as they are."""
    torch.compiler.reset()
    counters.clear()
    seen, row = [], Output.step

    def step(self, *words):
        seen.append(counters["stats"]["unique_graphs"])
        return row(self, *words)

    monkeypatch.setattr(Output, "step", step)
    monkeypatch.setattr(recompute.torch, "compile", partial(torch.compile, backend="eager"))
    yield seen
    torch.compiler.reset()


def test_nothing_is_compiled_after_the_first_evaluation(graphs, tiny, tmp_path):
    """Rows hold different numbers of documents of different lengths, every evaluation ends with a short batch."""
    dice = random.Random(0)
    rows = [{"prompt": "say", "completion": "red " * dice.choice((1, 5, 20))} for _ in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tiny.config(tmp_path, steps=7, eval={"every": 3}, checkpoint={"every": 4})
    words = ["memory.compile=true", "memory.recompute=none", "batch.micro_rows=1", "data.seq_len=128"]
    words += ["memory.tiled_mlp=48", "eval.exact_match=3", "eval.max_new_tokens=4"]
    train("lora_sft", "--config", file, f"data.sources=[{{path: {tmp_path}/rows.jsonl}}]", *words)
    assert len(graphs) == 7 and 0 < graphs[0] <= 4
    assert len(set(graphs[3:])) == 1, graphs
