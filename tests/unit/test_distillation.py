"""Distillation losses against the formulas over whole logits, in float64 and differentiated by autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ftlib.data import Documents, Loader, teacher_store
from ftlib.errors import UserError
from ftlib.kernels import linear_cross_entropy as kernel
from ftlib.losses.distillation import StoredTeacher, Teacher, distillation_loss
from ftlib.sections import Distill

N, D, V = 21, 8, 37
KINDS = ("forward_kl", "reverse_kl", "js")


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::4] = -100
    return draw(N, D).requires_grad_(), draw(V, D).requires_grad_(), draw(N, D + 3), draw(V, D + 3), labels


def by_formula(student, teacher, labels, cfg, own=None):
    """torch's own kl_div over whole distributions of the rows that have a target, each times `own` [N]."""
    kept = labels != -100
    q, p = (F.log_softmax(x[kept] / cfg.temperature, -1) for x in (student, teacher))
    own = torch.ones(len(labels), dtype=student.dtype) if own is None else own.double()
    # KL(a, b)
    kl = lambda a, b: (own[kept] * F.kl_div(b, a, reduction="none", log_target=True).sum(-1)).sum()  # noqa: E731
    if cfg.divergence == "forward_kl":
        soft = kl(p, q)
    elif cfg.divergence == "reverse_kl":
        soft = kl(q, p)
    else:
        m = (cfg.beta * p.exp() + (1 - cfg.beta) * q.exp()).log()
        soft = cfg.beta * kl(p, m) + (1 - cfg.beta) * kl(q, m)
    hard = (own[kept] * F.cross_entropy(student[kept], labels[kept], reduction="none")).sum() if cfg.hard else 0.0
    return (1 - cfg.hard) * cfg.temperature**2 * soft + cfg.hard * hard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"temperature": 2.5, "hard": 0.3, "beta": 0.1}], ids=["plain", "tempered"])
@pytest.mark.parametrize("own", [None, torch.linspace(0, 3, N)], ids=["", "weighted"])
def test_value_and_gradients_are_the_formulas(kind, more, own, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_BYTES", V * 8 * 8 * 4)  # tiles of four rows
    monkeypatch.setattr(kernel, "TRAINED", 1)
    more = {key: value for key, value in more.items() if key != "beta" or kind == "js"}
    cfg = Distill(teacher="t", divergence=kind, **more)
    (hidden, head, theirs, their_head, labels), (h2, w2, *_) = tensors(), tensors()
    terms, their_terms = {"scale": 0.7, "softcap": 3.0}, {"scale": 0.9, "softcap": None}
    targets = int((labels != -100).sum())
    teacher = Teacher(theirs, their_head, **their_terms)
    loss = distillation_loss(hidden, head, teacher, labels, cfg, weights=own, targets=targets, **terms)
    wanted = by_formula(3.0 * torch.tanh(0.7 * h2 @ w2.T / 3.0), 0.9 * theirs @ their_head.T, labels, cfg, own)
    (2 * loss).backward(), (2 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(hidden.grad, h2.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.grad, w2.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tokens_and_one_outcome_for_the_rest(kind):
    hidden, head, theirs, their_head, labels = tensors()
    cfg, k = Distill(teacher="t", divergence=kind), 5
    p, q = (F.log_softmax(x, -1) for x in (theirs @ their_head.T, hidden @ head.T))
    top = p.topk(k, -1)
    loss = distillation_loss(hidden, head, StoredTeacher(top.indices, top.values), labels, cfg)
    found = [x.gather(1, top.indices) for x in (p, q)]
    wide = [torch.cat((x, (1 - x.exp().sum(1)).log()[:, None]), 1) for x in found]
    assert loss.item() == pytest.approx(by_formula(wide[1], wide[0], labels, cfg).item(), rel=1e-9)
    every = p.topk(V, -1)
    full = distillation_loss(hidden, head, StoredTeacher(every.indices, every.values), labels, cfg)
    assert full.item() == pytest.approx(by_formula(q, p, labels, cfg).item(), rel=1e-6)
    assert loss < full, "what is merged cannot be told apart"


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    _, _, theirs, their_head, labels = tensors()
    for kind in KINDS:
        mine = theirs.clone().requires_grad_()
        cfg = Distill(teacher="t", divergence=kind)
        loss = distillation_loss(mine, their_head, Teacher(theirs, their_head), labels, cfg)
        loss.backward()
        assert abs(loss.item()) < 1e-12 and mine.grad.abs().max() < 1e-12


def test_reverse_kl_picks_one_mode_where_forward_covers_both():
    """A student that cannot have two modes: what the two directions are known to do."""
    places = torch.arange(40.0, dtype=torch.float64)
    teacher = torch.logaddexp(-((places - 10) ** 2) / 8, -((places - 30) ** 2) / 8 - 0.3)[None]
    found = {}
    for kind in ("forward_kl", "reverse_kl"):
        centre = torch.tensor(14.0, dtype=torch.float64)
        cfg, eye = Distill(teacher="t", divergence=kind), torch.eye(40, dtype=torch.float64)
        for _ in range(800):
            c = centre.clone().requires_grad_()
            logits = (-((places - c) ** 2) / 8)[None]
            loss = distillation_loss(logits, eye, Teacher(teacher, eye), torch.zeros(1, dtype=torch.int64), cfg)
            loss.backward()
            centre = (c - 0.2 * c.grad).detach()
        found[kind] = centre.item()
    assert 15 < found["forward_kl"] < 25 and found["reverse_kl"] < 11


def test_the_store_gives_back_what_the_teacher_said_row_by_row(tmp_path):
    dice = np.random.default_rng(0)
    documents = Documents.from_rows([(dice.integers(3, V, n), np.ones(n, bool)) for n in dice.integers(2, 30, 25)])

    def top_k(batch):  # depends on the token and its position alone
        ids = (batch.input_ids[..., None] + torch.arange(3)) % V
        return ids, -(batch.position_ids[..., None] + torch.arange(3.0))

    about = {"teacher": "t"}
    assert not teacher_store.exists(tmp_path, about)
    teacher_store.make(tmp_path, documents, about, top_k, 3, 32)
    assert teacher_store.exists(tmp_path, about)
    with pytest.raises(UserError, match="other settings"):
        teacher_store.exists(tmp_path, {"teacher": "another"})
    store = teacher_store.TeacherStore(tmp_path, documents)
    step = next(Loader(documents, seq_len=32, rows=4, micro_rows=4, seed=1, pack=True, pad_id=0))
    ids, logprobs = store.rows(step.packs, 32)
    (batch,) = step.micro_batches
    wanted = top_k(batch)
    filled = [sum(documents.lengths[member] for member in row) for row in step.packs]
    real = (torch.arange(32) < torch.tensor(filled)[:, None]).flatten()
    assert torch.equal(ids[real], wanted[0].flatten(0, 1)[real])
    assert torch.equal(logprobs[real], wanted[1].flatten(0, 1)[real])


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"beta": 1.0}, {"beta": 0.9}, {"hard": 1.5}, {"top_k": 0}, {"top_k": 32}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Distill(teacher="t", **settings)
