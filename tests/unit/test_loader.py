"""The loader: order independent of ranks, a position of two integers, numbers known in advance."""

from collections import Counter

import numpy as np
import pytest
import torch

from ftlib.data import Documents, Loader, eval_batches
from ftlib.data.documents import SourceInfo
from ftlib.data.loader import AHEAD
from ftlib.errors import UserError
from ftlib.layers.batch import Batch, Layout

SEQ_LEN, PAD = 64, 0


def make_documents(count=150, weights=(1.0,), seed=0):
    """Documents whose every token is 1000 * (index + 1) + position, so that a batch tells where each came from."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(random.integers(2, SEQ_LEN // 2))
        rows.append((1000 * (index + 1) + np.arange(length), random.random(length) < 0.6))
    sources = [SourceInfo(f"s{i}", f"s{i}.jsonl", weight) for i, weight in enumerate(weights)]
    return Documents.from_rows(rows, sources=sources, source_ids=np.arange(count, dtype=np.int32) % len(weights))


def make_loader(documents, **changes):
    keywords = {"rows": 8, "micro_rows": 1, "seed": 5, "pack": True, "pad_id": PAD, "rank": 0, "ranks": 1, **changes}
    return Loader(documents, seq_len=SEQ_LEN, **keywords)


def signature(step):
    return [(b.input_ids.tolist(), b.labels.tolist(), b.layout.cu_seqlens.tolist()) for b in step.micro_batches]


def rows_of(steps):
    """Rows of a step over all ranks, in order."""
    return torch.cat([batch.input_ids for step in steps for batch in step.micro_batches])


def indices(rows):
    """Documents in rows of ids, counted by their first tokens."""
    first = rows[(rows % 1000 == 0) & (rows > 0)]
    return Counter((first // 1000 - 1).tolist())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("ranks,micro_rows", [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
def test_every_rank_count_sees_the_same_rows(pack, ranks, micro_rows):
    documents = make_documents()
    alone = make_loader(documents, pack=pack)
    loaders = [
        make_loader(documents, pack=pack, rank=rank, ranks=ranks, micro_rows=micro_rows) for rank in range(ranks)
    ]
    for epoch in range(2):
        seen = Counter()
        for number in range(alone.steps_per_epoch(epoch)):
            one, many = next(alone), [next(loader) for loader in loaders]
            assert torch.equal(rows_of([one]), rows_of(many))
            labels = sum(int((b.labels != -100).sum()) for step in many for b in step.micro_batches)
            assert {one.target_tokens, *(step.target_tokens for step in many)} == {labels}
            assert one.tokens == sum(b.tokens for step in many for b in step.micro_batches)
            assert one.packs == many[0].packs
            assert one.epoch == pytest.approx(epoch + (number + 1) / alone.steps_per_epoch(epoch), abs=0.2)
            seen += indices(rows_of([one]))
        assert seen == Counter(range(len(documents)))
        assert alone.state_dict() == {"epoch": epoch + 1, "next_pack": 0}


def test_shapes_are_constant():
    loader = make_loader(make_documents(), micro_rows=2)
    steps = [next(loader) for _ in range(3 * loader.steps_per_epoch())]
    shapes = {
        (b.input_ids.shape, b.layout.cu_seqlens.shape, b.layout.max_seqlen) for s in steps for b in s.micro_batches
    }
    assert shapes == {((2, SEQ_LEN), (2 * (loader.max_documents + 1) + 1,), SEQ_LEN)}
    evaluation = eval_batches(make_documents(70, seed=1), SEQ_LEN, 2, PAD, max_documents=loader.max_documents)
    assert {(b.input_ids.shape, b.layout.cu_seqlens.shape, b.layout.max_seqlen) for b in evaluation} == shapes


def test_rows_without_packing_are_as_wide_as_they_need():
    random = np.random.default_rng(0)
    rows = [(np.arange(1, n + 1), random.random(n) < 0.6) for n in random.integers(2, 301, 90)]
    documents = Documents.from_rows(rows)
    settings = {"seq_len": 320, "rows": 8, "micro_rows": 2, "seed": 5, "pack": False, "pad_id": PAD, "multiple": 16}
    wide, narrow = Loader(documents, **{**settings, "multiple": 320}), Loader(documents, **settings)
    pair = [Loader(documents, **settings, rank=rank, ranks=2) for rank in range(2)]
    sizes, tokens, positions = set(), 0, 0
    for _ in range(wide.steps_per_epoch()):
        whole, step, parts = next(wide), next(narrow), [next(loader) for loader in pair]
        assert (whole.packs, whole.tokens, whole.target_tokens) == (step.packs, step.tokens, step.target_tokens)
        assert signature(step) == [micro for part in parts for micro in signature(part)]  # however many ranks there are
        for all_of_it, batch in zip(whole.micro_batches, step.micro_batches, strict=True):
            size = batch.input_ids.shape[1]
            longest = max((batch.input_ids != PAD).sum(1).tolist())
            assert longest <= size and (size == 16 or size < 1.5 * longest + 16)
            for name in ("input_ids", "labels"):
                assert torch.equal(getattr(batch, name), getattr(all_of_it, name)[:, :size])
            assert (all_of_it.labels[:, size:] == -100).all()
            assert batch.layout.max_seqlen == size and batch.layout.cu_seqlens.shape == (5,)
            sizes.add(size)
            tokens, positions = tokens + batch.tokens, positions + batch.input_ids.numel()
    known = {16, 32, 48, 64, 96, 128, 192, 256, 320}
    assert sizes <= known and len(sizes) > 3
    # The epoch's last step is filled with rows of padding, which the plan does not count.
    assert narrow.plan.padding(2) == pytest.approx(1 - tokens / positions, abs=0.03)
    assert narrow.state_dict() == wide.state_dict()
    held = list(eval_batches(documents, 320, 2, PAD, max_documents=1, multiple=16))
    assert sum(b.target_tokens for b in held) == documents.target_counts.sum()
    assert {b.input_ids.shape[1] for b in held} <= known


def test_epochs_differ_and_seeds_differ():
    documents = make_documents()
    loader = make_loader(documents)
    epochs = [[signature(next(loader)) for _ in range(loader.steps_per_epoch(e))] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert signature(next(make_loader(documents, seed=6))) != epochs[0][0]
    assert signature(next(make_loader(documents))) == epochs[0][0]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.3, 2.5)])
def test_resume_anywhere(weights):
    documents = make_documents(weights=weights)
    loader = make_loader(documents, rows=4)
    states, steps = [loader.state_dict()], []
    for _ in range(2 * loader.steps_per_epoch() + 3):
        steps.append(signature(next(loader)))
        states.append(loader.state_dict())
    assert all(set(state) == {"epoch", "next_pack"} for state in states)
    ends = [i for i, state in enumerate(states) if state["next_pack"] == 0]
    assert len(ends) == 3  # the start, and two ends of epochs
    for at in {*ends, 1, 7, len(steps) - 2}:
        fresh = make_loader(documents, rows=4)
        next(fresh)  # what was made in advance must not survive
        fresh.load_state_dict(states[at])
        assert fresh.state_dict() == states[at]
        assert [signature(next(fresh)) for _ in steps[at:]] == steps[at:]


def test_resume_at_other_rank_count():
    documents = make_documents()
    alone = make_loader(documents)
    next(alone)
    state = alone.state_dict()
    wanted = [rows_of([next(alone)]) for _ in range(6)]
    pair = [make_loader(documents, rank=rank, ranks=2, micro_rows=2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(state)
    assert all(torch.equal(rows_of([next(loader) for loader in pair]), rows) for rows in wanted)


def test_global_random_state_is_untouched():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = make_loader(make_documents())
    for _ in range(5):
        next(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_weights_of_sources():
    documents = make_documents(count=90, weights=(1.0, 0.5, 2.0))
    loader = make_loader(documents)
    seen = Counter()
    for epoch in range(2):
        for _ in range(loader.steps_per_epoch(epoch)):
            seen += indices(rows_of([next(loader)]))
    assert [{count for i, count in seen.items() if i % 3 == s} for s in range(3)] == [{2}, {1}, {4}]
    assert len(seen) == 90


def test_epoch_without_rows_is_passed_over():
    documents = make_documents(count=1, weights=(0.6,))
    loader = make_loader(documents, rows=1)
    epochs = [next(loader).epoch for _ in range(4)]
    assert epochs == [1, 3, 5, 6]  # round(0.6 e) grows in epochs 0, 2, 4 and 5
    with pytest.raises(UserError, match="no rows"):
        make_loader(make_documents(count=1, weights=(0.1,)), rows=1)


@pytest.mark.parametrize("rows,micro_rows,ranks", [(8, 3, 1), (6, 2, 2), (1, 1, 2)])
def test_rows_must_divide(rows, micro_rows, ranks):
    with pytest.raises(UserError) as error:
        make_loader(make_documents(), rows=rows, micro_rows=micro_rows, ranks=ranks)
    assert all(key in str(error.value) for key in ("batch.rows", "batch.micro_rows", "parallel."))


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "next_pack": -1}, {"epoch": 0, "next_pack": 10**6}])
def test_impossible_positions(state):
    with pytest.raises(UserError):
        make_loader(make_documents()).load_state_dict(state)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_eval_batches(ranks):
    documents = make_documents(43)
    parts = [list(eval_batches(documents, SEQ_LEN, 2, PAD, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert indices(torch.cat([b.input_ids for part in parts for b in part])) == Counter(range(43))
    assert sum(b.target_tokens for part in parts for b in part) == documents.target_counts.sum()


def test_loss_of_packed_documents_equals_each_alone():
    """Per-document attention outputs and their gradients: packed rows against the document on its own."""
    torch.manual_seed(0)
    documents = make_documents(12)
    table = torch.randn(13_000, 8, dtype=torch.float64)

    def outputs(batch):
        q = table[batch.input_ids].unsqueeze(1).requires_grad_()
        batch.layout.prepare("sdpa", {None})
        mask = batch.layout.masks[None]
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)
        (y * (batch.labels != -100)[:, None, :, None]).square().sum().backward()
        return batch.input_ids.flatten().tolist(), y.detach()[:, 0].flatten(0, 1), q.grad[:, 0].flatten(0, 1)

    alone = {}
    for document in documents:
        ids, labels = (torch.from_numpy(t).long()[None] for t in (document.input_ids, document.labels))
        cu = torch.tensor([0, ids.numel()], dtype=torch.int32)
        keys, y, grad = outputs(Batch(ids, labels, torch.arange(ids.numel())[None], Layout.packed(cu, 64, ids.shape)))
        alone.update({key: (a, b) for key, a, b in zip(keys, y, grad, strict=True)})
    loader = make_loader(documents)
    for batch in next(loader).micro_batches:
        for key, y, grad in zip(*outputs(batch), strict=True):
            if key != PAD:
                torch.testing.assert_close(y, alone[key][0], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(grad, alone[key][1], rtol=1e-12, atol=1e-12)


def test_steps_are_made_while_a_step_is_trained_on():
    loader = make_loader(make_documents())
    next(loader)
    made = list(loader._made)
    assert len(made) == AHEAD
    for step in made:  # without being asked for
        assert step.result(timeout=60)[0].micro_batches
    assert next(loader) is made[0].result()[0]
