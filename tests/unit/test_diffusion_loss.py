"""Masked diffusion: what is hidden, what it weighs, who sees whom, and how samples are restored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.shrink import shrunk

from ftlib.layers.batch import IGNORED, from_documents
from ftlib.layers.bidirectional import Bidirectional
from ftlib.losses.diffusion import diffusion_loss, hide, sample
from ftlib.models import families
from ftlib.models.language_model import LanguageModel

MASK = 9


def document(length, start=10, trained=True):
    ids = np.arange(start, start + length, dtype=np.int32)
    labels = np.full(length, IGNORED, np.int32)
    if trained:
        labels[:-1] = ids[1:]
    return ids, labels


def test_trained_tokens_are_hidden_with_the_chance_of_their_document():
    batch = from_documents([[document(2000), document(1500), document(300, trained=False)]], 4000, 0, 3)
    shares = []
    for seed in range(40):
        noised = hide(batch, MASK, 0.001, [seed])
        hidden = noised.batch.input_ids == MASK
        assert torch.equal(hidden, noised.batch.labels != IGNORED)
        assert torch.equal(noised.batch.labels[hidden], batch.input_ids[hidden])
        assert torch.equal(noised.batch.input_ids[~hidden], batch.input_ids[~hidden])
        assert not hidden[0, 3500:].any() and not hidden[0, 0] and not hidden[0, 2000]
        for part in (slice(1, 2000), slice(2001, 3500)):
            chance = 1 / noised.weights[0, part][hidden[0, part]]
            assert len(chance.unique()) == 1
            share = hidden[0, part].float().mean().item()
            assert share == pytest.approx(chance[0].item(), abs=0.06)
            shares.append(share)
        assert noised.batch.target_tokens == int(hidden.sum())
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.12)  # t is uniform
    again = hide(batch, MASK, 0.001, [3])
    assert torch.equal(again.weights, hide(batch, MASK, 0.001, [3]).weights)
    assert not torch.equal(again.weights, hide(batch, MASK, 0.001, [4]).weights)


def test_weights_of_tokens_go_with_them():
    """Labels are shifted, hidden tokens are not: each keeps the weight of its own."""
    told = lambda ids: (ids / 64).astype(np.float32)  # noqa: E731
    rows = [[(ids, labels, told(labels) * (labels != IGNORED)) for ids, labels in (document(30), document(20, 50))]]
    plain = hide(from_documents([[piece[:2] for piece in rows[0]]], 52, 0, 2), MASK, 0.1, [5])
    noised = hide(from_documents(rows, 52, 0, 2), MASK, 0.1, [5])
    ids = np.where(noised.batch.labels == IGNORED, 0, noised.batch.labels)
    torch.testing.assert_close(noised.weights, plain.weights * torch.from_numpy(told(ids)))
    assert noised.weights.count_nonzero() == noised.batch.target_tokens > 5 and noised.batch.weights is None


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    rows = [[document(30)], [document(20), document(9)], [document(25)]]
    together = hide(from_documents(rows, 32, 0, 2), MASK, 0.1, [5, 6, 7])
    alone = hide(from_documents(rows[1:2], 32, 0, 2), MASK, 0.1, [6])
    assert torch.equal(together.batch.input_ids[1:2], alone.batch.input_ids)
    narrow = hide(from_documents(rows[2:], 25, 0, 1), MASK, 0.1, [7], 32)  # as a row without packing is
    assert torch.equal(together.batch.input_ids[2, :25], narrow.batch.input_ids[0])
    assert torch.equal(together.weights[2, :25], narrow.weights[0])


def test_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 12, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 20, (1, 12), generator=generator)
    labels[0, ::3] = IGNORED
    weights = torch.rand(1, 12, generator=generator) * 5
    loss = diffusion_loss(hidden, head, labels, weights)
    nll = F.cross_entropy(hidden[0] @ head.T, labels[0], ignore_index=IGNORED, reduction="none")
    wanted = (nll * weights[0]).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)
    (mine,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (theirs,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def tiny():
    config = shrunk("llama-3.2-1b", num_hidden_layers=2)
    arch, table = families.read(config)
    model = LanguageModel(arch, table, config)
    model.model.init_weights(0, 0.2)
    return model.double().eval()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_token_sees_its_whole_document_and_no_other(backend):
    model = tiny()
    model.model.use_attention(backend)
    batch = from_documents([[document(7), document(6)]], 16, 0, 2)
    batch.layout = Bidirectional(batch.layout)
    embeds = model.model.embed(batch).detach().requires_grad_()
    for place in (2, 9):
        (grad,) = torch.autograd.grad(model(batch, embeds)[0, place].sum(), embeds, retain_graph=True)
        seen = (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        assert seen == (list(range(7)) if place == 2 else list(range(7, 13)))


class Knows(torch.nn.Module):
    """Certain of place i's token (10 + i), the more the later it stands; it also likes the mask token."""

    def __init__(self):
        super().__init__()
        self.lm_head, self.asked = SimpleNamespace(weight=torch.zeros(1)), []

    def forward(self, batch):
        self.asked.append((batch.input_ids[0] == MASK).sum().item())
        return batch.position_ids[..., None].float()

    def head(self, hidden):
        logits = F.one_hot((hidden[:, 0] + 10).long(), 40).float() * (1 + hidden)
        logits[:, MASK] = 100.0
        return logits


def test_samples_restore_the_most_certain_first_in_even_rounds():
    model = Knows()
    assert sample(model, [[10, 11]], 8, MASK, steps=4) == [list(range(12, 20))]
    assert model.asked == [8, 6, 4, 2]
    model = Knows()
    assert sample(model, [[10]], 7, MASK, steps=99, block=3) == [list(range(11, 18))]
    assert len(model.asked) == 7
