"""Scale and soft-cap of the logits reach every loss: the evaluation's, and each recipe's."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.evaluation import held_out
from ftlib.layers.batch import from_documents


class OneProcess:
    device = torch.device("cpu")
    total = share = staticmethod(lambda x: x)


@pytest.mark.parametrize("name", ["gemma-2-2b", "granite-3.3-8b"])
def test_held_out_loss_equals_transformers(name, tmp_path):
    config = shrunk(name)
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(1))
    labels = F.pad(x[1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x[None]).logits[0], labels, ignore_index=-100)
    batch = from_documents([[(x.numpy(), labels.numpy())]], 40, pad_id=0, max_documents=1)
    mine = held_out.loss(models.from_pretrained(tmp_path), [batch], OneProcess())
    assert relative(torch.tensor(mine), expected) <= 1e-5


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_hand_them_over(file):
    source = file.read_text()
    calls = len(re.findall(r"\bnext_token_loss\(", source))
    assert calls == 0 or "**terms" in source or source.count("**model.logit_terms") >= calls
