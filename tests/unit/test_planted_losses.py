"""Losses where a model's own logits differ from plain ones: scaled, capped, and stored for later."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_model import write_model
from torch import nn

from ftlib import models
from ftlib.layers.batch import from_documents
from ftlib.losses.diffusion import hide, sample
from ftlib.losses.distillation import Teacher, most_likely
from ftlib.losses.multi_token import multi_token_loss
from ftlib.models import mtp
from ftlib.sections import Loss, Mtp


class Says(nn.Module):
    """A model whose hidden states are given."""

    def __init__(self, hidden, head, **terms):
        super().__init__()
        self.hidden, self.logit_terms = hidden, terms
        self.lm_head = SimpleNamespace(weight=head)

    def forward(self, batch):
        return self.hidden


@pytest.mark.parametrize("terms", [{"scale": 1.0, "softcap": None}, {"scale": 0.25, "softcap": 3.0}])
def test_what_a_teacher_stores_are_its_own_log_probabilities(terms):
    draws = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((2, 5, 8), (37, 8)))
    logits = terms["scale"] * hidden @ head.T
    if terms["softcap"]:
        logits = terms["softcap"] * torch.tanh(logits / terms["softcap"])
    wanted = F.log_softmax(logits, -1).topk(4, -1)
    ids, logprobs = most_likely(Says(hidden, head, **terms), SimpleNamespace(input_ids=torch.zeros(2, 5)), 4)
    assert torch.equal(ids, wanted.indices)
    torch.testing.assert_close(logprobs, wanted.values, rtol=1e-9, atol=1e-12)


def test_a_teacher_s_cap_and_scale_are_its_own():
    draws = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((5, 8), (37, 8)))
    found = Teacher(hidden, head, 0.5, 2.0).logprobs(slice(1, 4), 1.5, torch.float64)
    wanted = F.log_softmax(2.0 * torch.tanh(0.5 * hidden[1:4] @ head.T / 2.0) / 1.5, -1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_every_document_hides_its_least_share():
    ids = np.arange(10, 22, dtype=np.int32)
    rows = [[(ids, np.append(ids[1:], -100).astype(np.int32))] * 40]
    noised = hide(from_documents(rows, 480, 0, 40), 3, 0.5, [1])
    found = noised.weights[noised.weights > 0]
    assert found.max() <= 2 and found.min() >= 1 and len(found.unique()) > 20


class Doubts(nn.Module):
    """Place 1 has one rival that is nearly as likely, place 2 many that are not; it remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.lm_head, self.asked = SimpleNamespace(weight=torch.zeros(1)), []

    def forward(self, batch):
        self.asked.append(batch.input_ids[0].tolist())
        return batch.position_ids[..., None].float()

    def head(self, hidden):
        one = torch.tensor([0.0, 0.55, 0.45, *[1e-9] * 50])
        many = torch.tensor([0.0, 0.01, 0.5, *[0.49 / 50] * 50])
        return torch.stack([one if place == 1 else many for place in hidden[:, 0].int().tolist()]).log()


def test_what_stays_at_a_temperature_is_what_the_model_is_sure_of():
    """Not what the sharper distribution of the draw makes of it."""
    for seed in range(5):
        model = Doubts()
        (found,) = sample(model, [[9]], 2, 0, steps=2, temperature=0.05, seed=seed)
        assert found == [1, 2] and model.asked == [[9, 0, 0], [9, 1, 0]]


@pytest.mark.parametrize("terms", [{}, {"scale": 0.5, "softcap": 2.0}])
def test_tokens_further_ahead_follow_the_rule_and_the_model_s_own_logits(terms, tmp_path, monkeypatch):
    model = models.from_pretrained(write_model(tmp_path), dtype=torch.float32)
    mtp.attach(model, Mtp(depth=1, weight=0.3))
    model.mtp.to_empty(device="cpu")
    mtp.fill(model, None, 3)
    terms = terms or model.logit_terms
    monkeypatch.setattr(type(model), "logit_terms", terms)
    ids = np.arange(10, 22, dtype=np.int32)
    batch = from_documents([[(ids, np.append(ids[1:], -100).astype(np.int32))]], 12, 0, 1)
    with torch.no_grad():
        hidden = model(batch)
        found = multi_token_loss(model, hidden, batch, Loss(z_loss=0.1))
        read = mtp.ahead(batch.input_ids, batch.layout, 1, 0)
        logits = terms["scale"] * model.mtp[0](model, hidden, read, batch)[0, :10] @ model.lm_head.weight.T
    if terms["softcap"]:
        logits = terms["softcap"] * torch.tanh(logits / terms["softcap"])
    each = F.cross_entropy(logits, batch.labels[0, 1:11], reduction="none") + 0.1 * logits.logsumexp(-1).square()
    torch.testing.assert_close(found, 0.3 * each.sum(), rtol=1e-5, atol=1e-5)
