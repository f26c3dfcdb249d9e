"""Optimizers that look at whole matrices give on several processes what they give on one."""

import json
from pathlib import Path

import pytest
import torch
from faults.tiny_training import one_process
from optimizer_worker import held, train_low
from parallel import spawn

from ftlib.checkpoint import Saver
from ftlib.sections import Checkpoint

MESHES = {2: ["fsdp"], 4: ["hsdp", "fsdp_tp", "rows_twice"]}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_is_unsharded(world, tmp_path):
    """Last result of the slow part: equal on 2 x 2 (replicated and sharded, sharded twice, rows twice)."""
    words = [tmp_path, json.dumps(MESHES[world])]
    spawn.processes(Path(__file__).parent / "optimizer_worker.py", world, words, tmp_path)
    for rank in range(world):
        found = json.loads((tmp_path / f"report_{rank}.json").read_text())
        assert len(found) == (15 if world == 2 else 38)
        assert all(difference < 1e-12 for difference in found.values()), found
    if world == 2:
        went_on = train_low("int4", lambda x: x, steps=0)
        saver = Saver(Checkpoint(every=1), tmp_path / "run", one_process(), {}, say=lambda text: None)
        assert saver.resume(went_on) == 4
        found, wanted = held(went_on), held(train_low("int4", lambda x: x))
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
