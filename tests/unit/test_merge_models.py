"""Merged models against the papers' formulas, number by number, and as folders that load."""

import math
import shutil

import pytest
import torch
from tiny_model import ROOT, probe, write_model

from ftlib import models, plugins

tool = plugins.load_file(ROOT / "tools" / "merge_models.py")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_is_a_weighted_mean():
    a, b = draw(0, 3, 4), draw(1, 3, 4)
    torch.testing.assert_close(tool.linear([a, b], [3.0, 1.0]), 0.75 * a + 0.25 * b)


def test_slerp_keeps_the_angle_in_proportion():
    a, b = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    third = tool.slerp(a, b, 1 / 3)
    wanted = torch.tensor([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)], dtype=torch.float64)
    torch.testing.assert_close(third, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tool.slerp(a, b, 0.0), a)
    torch.testing.assert_close(tool.slerp(a, 3 * a, 0.25), 1.5 * a)
    x, y = draw(2, 5, 6), draw(3, 5, 6)
    middle = tool.slerp(x, y, 0.5)
    cos = lambda p, q: (p * q).sum() / (p.norm() * q.norm())  # noqa: E731
    angle = torch.arccos(cos(x, y))
    wanted = (x + y) * torch.sin(angle / 2) / torch.sin(angle)
    torch.testing.assert_close(middle, wanted, rtol=1e-10, atol=1e-12)


def ties_by_hand(base, tensors, weights, density):
    """The paper's three steps for flat lists of numbers."""
    deltas = [[x - b for x, b in zip(t, base, strict=True)] for t in tensors]
    for delta in deltas:
        order = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))
        for i in order[round(density * len(delta)):]:
            delta[i] = 0.0
    found = []
    for i, b in enumerate(base):
        votes = sum(w * d[i] for w, d in zip(weights, deltas, strict=True))
        agreed = [(w, d[i]) for w, d in zip(weights, deltas, strict=True) if d[i] * votes > 0]
        found.append(b + (sum(w * d for w, d in agreed) / sum(w for w, _ in agreed) if agreed else 0.0))
    return found


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties(density):
    base, others, weights = draw(0, 20), [draw(i, 20) for i in (1, 2, 3)], [1.0, 0.5, 2.0]
    wanted = ties_by_hand(base.tolist(), [x.tolist() for x in others], weights, density)
    found = tool.ties(base.view(4, 5), [x.view(4, 5) for x in others], weights, density)
    assert found.flatten().tolist() == pytest.approx(wanted, rel=1e-12)


def test_dare_drops_and_rescales():
    base, other = draw(0, 400, 50), draw(1, 400, 50)
    found = tool.dare(base, [other], [1.0], 0.25, torch.Generator().manual_seed(0)) - base
    kept = found != 0
    assert kept.double().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(found[kept], 4 * (other - base)[kept])
    again = tool.dare(base, [other], [1.0], 0.25, torch.Generator().manual_seed(0)) - base
    assert torch.equal(found, again)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = write_model(folder / "base")
    made = models.from_pretrained(base)
    for number in (1, 2):
        with torch.no_grad():
            for i, p in enumerate(made.parameters()):
                p += 0.02 * draw(10 * number + i, *p.shape).float()
        models.save_pretrained(made, folder / str(number))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / str(number) / file).write_bytes((base / file).read_bytes())
    return base, folder / "1", folder / "2"


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare"])
def test_folders_in_a_folder_out(method, folders, tmp_path, monkeypatch):
    base, *others = map(str, folders)
    monkeypatch.setattr(tool, "SHARD_BYTES", 100_000)  # several files
    more = ["--base", base] if method in ("ties", "dare") else []
    assert tool.main([str(tmp_path / "out"), *others, "--method", method, *more]) == 0
    merged = models.from_pretrained(tmp_path / "out")
    parts = [models.from_pretrained(folder) for folder in folders]
    assert not torch.allclose(probe(merged.logits), probe(parts[1].logits), atol=1e-4)
    if method == "linear":
        for p, a, b in zip(*(m.parameters() for m in (merged, *parts[1:])), strict=True):
            torch.testing.assert_close(p, (a + b) / 2)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_models_that_do_not_fit_are_named(folders, tmp_path, capsys):
    other = write_model(tmp_path / "other", num_hidden_layers=1)
    assert tool.main([str(tmp_path / "out"), str(folders[0]), str(other)]) == 2
    assert "differ in" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_tokenizer_and_a_density_without_use_are_told(folders, tmp_path, capsys):
    _, first, second = folders
    other = tmp_path / "other"
    shutil.copytree(second, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert tool.main([str(tmp_path / "same"), str(first), str(second)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert tool.main([str(tmp_path / "out"), str(first), str(other)]) == 0
    assert "another tokenizer.json" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "no"), str(first), str(second), "--density", "0.3"]) == 2
    assert "--density: for ties and dare" in capsys.readouterr().err


def test_mistakes_read_like_those_of_the_verbs(folders, tmp_path, capsys):
    out, first = str(tmp_path / "out"), str(folders[0])
    for words, what in {
        (out,): "error: merge_models.py: the following arguments are required: models\n  fix: merge_models.py [-h]",
        (out, first, "--metod", "ties"): "unknown option '--metod' (did you mean '--method'?)",
        (out, first, first, "--method", "mean"): "invalid choice: 'mean'",
        (out, first, "nowhere"): "error: nowhere is no folder\n  fix: name a model's folder",
    }.items():
        assert tool.main(words) == 2
        assert what in capsys.readouterr().err
