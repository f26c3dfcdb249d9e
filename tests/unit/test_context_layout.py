"""Attention over rows that lie on several processes, played through in one: each process's part is the whole's."""

import math
import threading
from functools import partial
from queue import SimpleQueue

import pytest
import torch
from unit.test_attention_backends import flash_backward, flash_forward, scores
from unit.test_flash4 import StandIn

from ftlib.kernels import flash4_attention
from ftlib.kernels import varlen_attention as varlen
from ftlib.layers.attention import attend
from ftlib.layers.batch import Layout
from ftlib.parallel import context, ring

ENDS = [[0, 7, 9, 16, 32, 48, 61, 64, 64, 64], [0, 32, 64], [0, 1, 2, 30, 32, 40, 41, 64, 64, 64]]  # rows of 32


class Group:
    """One of `size` processes."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def operands():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    return q, k, v, torch.randn(4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ends", ENDS, ids=["packed", "dense", "short"])
@pytest.mark.parametrize("backend", ["varlen", "flash4", "sdpa"])
def test_gathered_keys_and_pieces_of_queries(monkeypatch, backend, ends, window, sinks):
    monkeypatch.setattr(flash4_attention, "package", lambda: StandIn)
    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(varlen, "_backward", flash_backward)
    whole = Layout.packed(torch.tensor(ends, dtype=torch.int32), 32, (2, 32))
    whole.prepare("reference", {window})
    q, k, v, sink = (t.requires_grad_() for t in operands())
    options = {"window": window, "sinks": sink if sinks else None}
    wanted = attend(q, k, v, whole, backend="reference", **options)
    inputs = (q, k, v, *([sink] if sinks else []))
    gradients = torch.autograd.grad((wanted * torch.sin(wanted.detach() * 9)).sum(), inputs)
    parts, loss = [], 0.0
    for rank in range(2):
        layout = context.ContextLayout(whole, Group(rank, 2), "allgather")
        layout.prepare(backend, {window})
        order = layout.order
        monkeypatch.setattr(context, "gather", lambda x, dim, group: x)
        monkeypatch.setattr(context.ContextLayout, "_in_order", lambda self, x: x)
        y = attend(q[:, order], k, v, layout, backend=backend, **options)
        torch.testing.assert_close(y, wanted[:, order], rtol=1e-10, atol=1e-10)
        loss = loss + (y * torch.sin(y.detach() * 9)).sum()
        parts.append(order)
    assert torch.cat(parts).sort().values.tolist() == list(range(32)), "every token is on one process"
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_a_changed_document_changes_no_other(monkeypatch, backend):
    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(context, "gather", lambda x, dim, group: x)
    monkeypatch.setattr(context.ContextLayout, "_in_order", lambda self, x: x)
    whole = Layout.packed(torch.tensor(ENDS[0], dtype=torch.int32), 32, (2, 32))
    layout = context.ContextLayout(whole, Group(0, 2), "allgather")
    layout.prepare(backend, {None})
    q, k, v, _ = operands()
    before = attend(q[:, layout.order], k, v, layout, backend=backend, window=None)
    k[0, 3] += 1.0
    v[0, 3] += 1.0
    changed = (attend(q[:, layout.order], k, v, layout, backend=backend, window=None) != before).any(-1).any(-1)
    assert not changed[1].any() and changed[0].tolist() == [3 <= c < 7 for c in layout.order.tolist()]


def on_each(size, work):
    """[work(rank, send) of each of `size` processes], threads here, that pass tensors on in a ring."""
    queues, found = [SimpleQueue() for _ in range(size)], [None] * size

    def send(rank, x):
        queues[(rank + 1) % size].put(x.clone())
        return partial(queues[rank].get, timeout=20)

    def run(rank):
        found[rank] = work(rank, partial(send, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return found


def careless(grad, q, k, *rest):
    """The kernel's gradients, with anything at all where nothing is seen."""
    dq, dk, dv = flash_backward(grad, q, k, *rest)
    seen = scores(q, k, rest[3], rest[4], 1.0, 0, rest[-1])[0] > -math.inf
    lonely, unseen = ~seen.any(1)[:, None, None], ~seen.any(0)[:, None, None]
    return dq.masked_fill(lonely, math.nan), *(t.masked_fill(unseen, math.nan) for t in (dk, dv))


@pytest.mark.parametrize("ends", [*ENDS, [0, 3, 29, 32, 64]], ids=["packed", "dense", "short", "long"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("segments", [False, True], ids=["plain", "flash"])
def test_keys_that_are_passed_on(monkeypatch, segments, size, ends):
    monkeypatch.setattr(varlen, "_forward", flash_forward)
    monkeypatch.setattr(varlen, "_backward", careless)
    whole = Layout.packed(torch.tensor(ends, dtype=torch.int32), 32, (2, 32))
    whole.prepare("reference", {None})
    q, k, v = (t.requires_grad_() for t in operands()[:3])
    wanted = attend(q, k, v, whole, backend="reference", window=None)
    weight = torch.sin(wanted.detach() * 9)
    gradients = torch.autograd.grad((wanted * weight).sum(), (q, k, v))

    def work(rank, send):
        order = context.ContextLayout(whole, Group(rank, size), "ring").order
        parts = [t.detach()[:, order] for t in (q, k, v)]
        options = ring.who_sees_whom(whole, rank, size, segments), 8**-0.5, rank, size, send
        out, lse = ring.forward(*parts, *options)
        return order, out, *ring.backward(weight[:, order], *parts, out, lse, *options)

    for order, *ours in on_each(size, work):
        for mine, theirs in zip(ours, (wanted, *gradients), strict=True):
            torch.testing.assert_close(mine, theirs[:, order], rtol=1e-10, atol=1e-10)


def test_each_turn_of_the_ring_is_the_same_work():
    for size in (2, 4, 8):
        turns = [ring.schedule(rank, size) for rank in range(size)]
        assert {len(pairs) for one in turns for pairs in one[1:]} == {2}
        seen = sorted(pair for one in turns for pairs in one for pair in pairs)
        assert seen == [(query, key) for query in range(2 * size) for key in range(query + 1)]
