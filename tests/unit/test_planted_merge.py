"""Folders merged by the tool: which end is which, which entries are dropped, what is kept as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import ROOT

from ftlib import plugins
from ftlib.models import hub

tool = plugins.load_file(ROOT / "tools" / "merge_models.py")
SHAPE = (40, 50)


def folder(path, seed, **more):
    """A folder of two matrices of one shape, of numbers in (0.5, 1): a difference of 0 is a dropped one."""
    draws = torch.Generator().manual_seed(seed)
    tensors = {name: 0.5 + torch.rand(SHAPE, generator=draws) / 2 for name in ("a", "b")}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"seed": seed}))
    save_file(tensors | more, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def folders(tmp_path):
    """Zeros as the base, and two others."""
    made = [folder(tmp_path / name, seed) for seed, name in enumerate(("base", "first", "second"))]
    zeros = {name: torch.zeros(SHAPE) for name in ("a", "b")}
    save_file(zeros, made[0] / "model.safetensors", metadata={"format": "pt"})
    return made


def merged(out, *words):
    """The tensors of the merged folder; it may have several files."""
    assert tool.main([str(out), *map(str, words)]) == 0
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_dare_drops_others_in_each_tensor_and_the_same_again(folders, tmp_path):
    base, first, _ = folders
    words = (first, "--base", base, "--method", "dare", "--density", "0.5")
    one, again = (merged(tmp_path / name, *words) for name in ("one", "again"))
    kept = [one[name] != 0 for name in ("a", "b")]
    assert [mask.float().mean().item() for mask in kept] == pytest.approx([0.5, 0.5], abs=0.05)
    assert (kept[0] == kept[1]).float().mean().item() == pytest.approx(0.5, abs=0.08), "independent draws"
    assert all(torch.equal(again[name], one[name]) for name in one)


def test_weights_say_how_near_each_model_is(folders, tmp_path):
    _, first, second = folders
    a, b = (load_file(path / "model.safetensors")["a"] for path in (first, second))
    for method in ("linear", "slerp"):
        found = merged(tmp_path / method, first, second, "--method", method, "--weights", "9", "1")["a"]
        assert (found - a).norm() < 0.2 * (found - b).norm(), method
        assert json.loads((tmp_path / method / "config.json").read_text()) == {"seed": 1}, "the first model's"


def test_opposite_tensors_are_joined_by_a_straight_line():
    a = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tool.slerp(a, -a, 0.25), 0.5 * a)
    torch.testing.assert_close(tool.slerp(a, -(1 + 1e-6) * a, 0.5), torch.zeros_like(a), rtol=0, atol=1e-5)


def test_precision_and_whole_numbers_are_the_first_model_s(tmp_path):
    wide = {"half": torch.rand(4, 4).bfloat16(), "ids": torch.arange(4)}
    other = {"half": torch.rand(4, 4), "ids": torch.arange(4) + 7}
    first, second = folder(tmp_path / "first", 1, **wide), folder(tmp_path / "second", 2, **other)
    found = merged(tmp_path / "out", first, second)
    assert found["half"].dtype == torch.bfloat16 and torch.equal(found["ids"], torch.arange(4))
    torch.testing.assert_close(found["half"], ((wide["half"].float() + other["half"]) / 2).bfloat16())


@pytest.mark.parametrize("size", [1, 8000, 12000, 10**9])
def test_every_tensor_is_in_a_file_that_the_index_names(size, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SHARD_BYTES", size)
    _, first, second = folders
    found = merged(tmp_path / "out", first, second)
    assert set(found) == {"a", "b"}
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        assert set(places) == {"a", "b"}
        assert all(name in load_file(tmp_path / "out" / file) for name, file in places.items())
    else:
        assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("tool", ["merge_models", "spectrum"])
def test_codes_are_not_taken_for_numbers(tool, tmp_path, capsys):
    """A model that is kept in few bits is refused: neither a mean of codes nor their spectrum says anything."""
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("ftlib:demo/model"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    words = [str(tmp_path / "out"), str(folder), str(folder)] if tool == "merge_models" else [str(folder)]
    assert plugins.load_file(ROOT / "tools" / f"{tool}.py").main(words) == 2
    assert "is kept in fp8" in capsys.readouterr().err and not (tmp_path / "out").exists()
