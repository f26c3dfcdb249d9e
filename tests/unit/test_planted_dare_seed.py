"""The seed of `--method dare`: another one drops other entries."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import ROOT

from ftlib import plugins

tool = plugins.load_file(ROOT / "tools" / "merge_models.py")


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (3, 1 << 20)])
def test_another_seed_drops_other_entries(seeds, tmp_path):
    """torch's generator on the CPU reads the lower 32 bits of a seed only: what lies above them changes nothing."""
    for name, value in {"base": 0.0, "model": 1.0}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({}))
        save_file({"a": torch.full((40, 50), value)}, tmp_path / name / "model.safetensors")
    words = [str(tmp_path / "model"), "--base", str(tmp_path / "base"), "--method", "dare", "--density", "0.5"]
    kept = []
    for seed in seeds:
        assert tool.main([str(tmp_path / str(seed)), *words, "--seed", str(seed)]) == 0
        kept.append(load_file(tmp_path / str(seed) / "model.safetensors")["a"] != 0)
    assert (kept[0] == kept[1]).float().mean().item() == pytest.approx(0.5, abs=0.08)
