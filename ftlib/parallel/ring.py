"""Attention whose keys and values pass from process to process, and are never gathered.

Liu et al. 2023 (arXiv 2310.01889), with an early and a late piece of the row on each process, so that causal attention
is the same work for all. While a process computes with the keys it has, they travel on. What queries get from one piece
of keys is merged with what they had before by the logarithms of their sums of exponentials. Backward takes each pair's
probabilities from the final ones, and the gradients of keys travel with them until they are home.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ftlib.kernels import varlen_attention as varlen
from ftlib.layers.batch import Layout
from ftlib.parallel.collectives import pass_on

Send = Callable[[Tensor], Callable[[], Tensor]]  # a tensor to the next process; then what the one before has sent
Parts = tuple[Tensor, ...]


def schedule(rank: int, size: int) -> list[list[tuple[int, int]]]:
    """For each turn, pairs (piece of queries, piece of keys) of 2 * size pieces, those of which any key is seen."""
    turns = []
    for step in range(size):
        mine, visiting = ((at, 2 * size - 1 - at) for at in (rank, (rank - step) % size))
        turns.append([(query, key) for query in mine for key in visiting if query >= key])
    return turns


def who_sees_whom(whole: Layout, rank: int, size: int, segments: bool) -> list[Tensor]:
    """For each pair of the schedule bool [B, P, P], P the length of a piece: which keys queries see.

    `segments`: int32 [2, n] instead, where segments of queries and keys lie in the pieces [B * P]. Within a piece these
    are its documents. In two pieces lies one document of a row at most: the keys before it, it, and the queries after.
    """
    (rows, length), ids, found = whole.shape, whole.document_ids, []
    size_of = length // (2 * size)
    for query, key in (pair for pairs in schedule(rank, size) for pair in pairs):
        queries, keys = (ids[:, at * size_of : (at + 1) * size_of] for at in (query, key))
        if not segments:
            same = queries[:, :, None] == keys[:, None]
            found.append(same.tril() if query == key else same)
        elif query == key:
            row, column = whole.cu_seqlens // length, whole.cu_seqlens % length
            inside = row * size_of + (column - query * size_of).clamp(0, size_of)
            found.append(torch.stack((inside, inside)).int())
        else:
            here, there = (queries == keys[:, -1:]).sum(1), (keys == queries[:, :1]).sum(1)
            none = torch.zeros_like(here)
            lengths = torch.stack((none, here, size_of - here, size_of - there, there, none), 1).view(rows, 2, 3)
            ends = lengths.transpose(0, 1).flatten(1).cumsum(1)
            found.append(torch.cat((ends.new_zeros(2, 1), ends), 1).int())
    return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, who: Sequence[Tensor], scale: float, rank: int, size: int, send: Send
) -> Parts:
    """Output, and the logarithm of each query's sum of exponentials [B, T / size, heads]."""
    queries, found, who = q.chunk(2, 1), {}, iter(who)
    visiting = torch.stack((k, v))
    for step, pairs in enumerate(schedule(rank, size)):
        following = send(visiting) if step + 1 < size else None
        for query, key in pairs:
            keys, values = visiting.chunk(2, 2)[key >= size]
            at = query >= size
            part = _pair(queries[at], keys, values, next(who), scale, query == key)
            found[at] = _merge(*found[at], *part) if at in found else part
        visiting = following() if following else None
    out, lse = (torch.cat(parts, 1) for parts in zip(found[False], found[True], strict=True))
    return out.to(q.dtype), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, who: Sequence[Tensor], scale: float,
    rank: int, size: int, send: Send,
) -> Parts:  # fmt: skip
    """Gradients of q, k and v."""
    pieces, who = tuple(zip(*(t.chunk(2, 1) for t in (grad, q, out, lse)), strict=True)), iter(who)
    visiting, arriving = torch.stack((k, v)), None
    of_queries = torch.zeros_like(q, dtype=lse.dtype)
    for step, pairs in enumerate(schedule(rank, size)):
        following = send(visiting) if step + 1 < size else None
        of_keys = torch.zeros_like(visiting, dtype=lse.dtype)
        for query, key in pairs:
            keys, values = visiting.chunk(2, 2)[key >= size]
            dq, *dkv = _pair_backward(*pieces[query >= size], keys, values, next(who), scale, query == key)
            of_queries.chunk(2, 1)[query >= size].add_(dq)
            of_keys.chunk(2, 2)[key >= size].add_(torch.stack(dkv))
        arriving = send(of_keys if arriving is None else of_keys + arriving())
        visiting = following() if following else None
    return of_queries.to(q.dtype), *(t.to(k.dtype, copy=True) for t in arriving())


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Parts:
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp()[..., None] + more * (more_lse - total).exp()[..., None], total


def _pair(q: Tensor, k: Tensor, v: Tensor, who: Tensor, scale: float, same: bool) -> Parts:
    """Wide output [B, P, H, D] and lse [B, P, H] of one piece of queries over one of keys; of nothing seen 0, -inf."""
    if who.dtype == torch.bool:
        scores = _scores(q, k, who, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
        out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v.to(lse.dtype))
        return out.flatten(2, 3), lse.flatten(1, 2).transpose(1, 2)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    out, lse, *_ = varlen._forward(*flat, *who, q.shape[1], scale, 0, same)
    lse = lse.T.unflatten(0, q.shape[:2])
    nothing = lse == torch.inf  # the kernel's word for it
    return out.view(q.shape).to(lse.dtype).masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)


def _pair_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, who: Tensor, scale: float, same: bool
) -> Parts:
    """Gradients of q, k and v by the part of the final probabilities that this pair has."""
    if who.dtype == torch.bool:
        heads = (k.shape[2], -1)
        grad, q, k, v, out = (t.to(lse.dtype) for t in (grad, q, k, v, out))
        weights = (_scores(q, k, who, scale) - lse.transpose(1, 2).unflatten(1, heads)[..., None]).exp()
        inner = (grad * out).sum(-1).transpose(1, 2).unflatten(1, heads)[..., None]
        grad, q = grad.unflatten(2, heads), q.unflatten(2, heads)
        of_scores = weights * (torch.einsum("bqhgd,bkhd->bhgqk", grad, v) - inner) * scale
        dq = torch.einsum("bhgqk,bkhd->bqhgd", of_scores, k).flatten(2, 3)
        return dq, *(torch.einsum("bhgqk,bqhgd->bkhd", *pair) for pair in ((of_scores, q), (weights, grad)))
    flat = [t.flatten(0, 1) for t in (grad, q, k, v, out)]
    seed, unused = (q.new_empty(n, dtype=torch.uint64) for n in (2, 0))  # of dropout, which there is none of
    sums = lse.flatten(0, 1).T.contiguous()
    grads = varlen._backward(*flat, sums, *who, seed, unused, q.shape[1], scale, 0, same)
    dq, dk, dv = (t.unflatten(0, q.shape[:2]) for t in grads)
    if not same:  # what the kernel leaves where nothing is seen is no promise
        at, (here, there) = torch.arange(q.shape[1], device=q.device), who.diff().view(2, -1, 3, 1)[:, :, 1]
        dq.masked_fill_((at >= here)[..., None, None], 0)
        for of_keys in (dk, dv):
            of_keys.masked_fill_((at < q.shape[1] - there)[..., None, None], 0)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, key heads, queries of each, P, P], in float32 at least; -inf where a key is not seen."""
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (k.shape[2], -1)), k) * scale
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


# Operators, because a compiled block cannot look at what passes between processes.
@torch.library.custom_op("ftlib::ring_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, who: Sequence[Tensor], scale: float, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, who, scale, rank, size, partial(pass_on, group=group))


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, who: Sequence[Tensor], scale: float, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("ftlib::ring_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, who: Sequence[Tensor], scale: float,
    rank: int, size: int, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, q, k, v, out, lse, who, scale, rank, size, partial(pass_on, group=group))


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, who: Sequence[Tensor], scale: float,
    rank: int, size: int, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs: tuple, output: Parts) -> None:  # noqa: ANN001
    q, k, v, who, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output, *who)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple:  # noqa: ANN001
    q, k, v, out, lse, *who = ctx.saved_tensors
    operator = torch.ops.ftlib.ring_attention_backward
    return *operator(grad.contiguous(), q, k, v, out, lse, who, *ctx.constants), [None] * len(who), *[None] * 4


_attention.register_autograd(_gradients, setup_context=_setup)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, who: Sequence[Tensor], scale: float, rank: int, size: int, group: str
) -> Tensor:
    """softmax(scale q k^T) v within each document, causal, for tokens [B, T / size], the pieces `rank` and
    2 size - 1 - rank of each row; [B, T / size, heads, D] like q. `group`: name of the process group.

    `who` (`who_sees_whom`): masks, for plain PyTorch in any dtype; or segments, for FlashAttention-2 (float16 or
    bfloat16 on a GPU).
    """
    q, k, v = (t.contiguous() for t in (q, k, v))
    return torch.ops.ftlib.ring_attention(q, k, v, who, scale, rank, size, group)[0]
