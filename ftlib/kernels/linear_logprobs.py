"""Head projection and log-probability of each label in one op: the logits of all tokens never exist at once."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ftlib.kernels import linear_cross_entropy as head
from ftlib.kernels.linear_cross_entropy import IGNORE, target_rows, tiles

ENTROPY_BYTES = 1 << 28  # float32 logits alive at a time while entropies are taken


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    targets: int | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    vocab_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z / temperature)[label] of each row, float32 [N] (float64 for float64 input), 0 where label == -100.

    hidden [N, D]; weight [V, D]; labels [N] int64; z, `targets` and `vocab_group` as in `linear_cross_entropy`.
    Differentiable in hidden and weight. Under a frozen head each logit is computed once, its gradient in the forward
    pass; a trained head's logits are computed again in backward, when the weight of each row is known.

    `entropy`: also the entropy of softmax(z / temperature) in nats, of the same shape and dtype, without a gradient.
    """
    vocab_group, weight = head.local_weight(weight, vocab_group)
    if temperature <= 0:
        raise ValueError("temperature must be above 0")
    # scale * softcap * tanh(x / softcap) at temperature t is the same with scale / t and softcap / t.
    terms = (scale / temperature, None if softcap is None else softcap / temperature, vocab_group)
    grads = torch.is_grad_enabled()
    needs = (grads and hidden.requires_grad, grads and weight.requires_grad)
    logprobs, entropies = _LinearLogprobs.apply(hidden, weight, labels, targets, terms, needs, entropy)
    return (logprobs, entropies) if entropy else logprobs


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) through all logits at once: the oracle."""
    logits = hidden @ weight.T
    wide = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    logp = (wide / temperature).log_softmax(-1)
    wanted = labels != IGNORE
    picked = logp.gather(1, labels.where(wanted, 0)[:, None])[:, 0]
    return picked.where(wanted, 0), -(logp.exp() * logp).sum(-1).where(wanted, 0).detach()


@torch.no_grad()
def tile_entropy(logits: Tensor, scale: float, softcap: float | None, group: ProcessGroup | None) -> Tensor:
    """Entropy of softmax(z) of each row, float32 [n]; logits [n, V], or this process's slice of V with a `group`."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * scale
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    top = wide.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    wide -= top
    weights = wide.exp()
    sums = torch.stack((weights.sum(-1), (weights * wide).sum(-1)))
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1] / sums[0]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        targets: int | None,
        terms: tuple[float, float | None, ProcessGroup | None],
        needs: tuple[bool, bool],
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scale, softcap, group = terms
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = hidden.new_zeros(len(labels), dtype=wide)
        entropies = torch.zeros_like(logprobs) if entropy else None
        rows = target_rows(labels, targets)
        ready = torch.zeros_like(hidden) if needs == (True, False) else None
        tile = head.tile_function(hidden.device, group)
        for at in tiles(rows, len(labels), head.tile_rows(hidden, weight, group)):
            logits = hidden[at] @ weight.T
            if entropy:
                pieces = logits.split(max(1, ENTROPY_BYTES // (4 * weight.shape[0])))
                entropies[at] = torch.cat([tile_entropy(piece, scale, softcap, group) for piece in pieces])
            logprobs[at] = -tile(logits, labels[at], scale, softcap)
            if ready is not None:
                ready[at] = -(logits @ weight)
        if ready is not None:
            ctx.save_for_backward(ready)
        elif any(needs):
            ctx.save_for_backward(hidden, weight, labels, rows)
        ctx.terms, ctx.needs = terms, needs
        if entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None or not any(ctx.needs):
            return (None,) * 7
        if ctx.needs == (True, False):
            (ready,) = ctx.saved_tensors
            return head.scaled(ready, grad[:, None], ready.dtype), *(None,) * 6
        hidden, weight, labels, rows = ctx.saved_tensors
        scale, softcap, group = ctx.terms
        grad_hidden = torch.zeros_like(hidden) if ctx.needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        tile = head.tile_function(hidden.device, group)
        for at in tiles(rows, len(labels), head.tile_rows(hidden, weight, group)):
            x = hidden[at]
            slope = x @ weight.T
            tile(slope, labels[at], scale, softcap)
            if grad_hidden is not None:
                grad_hidden[at] = head.by_row(slope @ weight, -grad[at])
            grad_weight += slope.T @ head.by_row(x, -grad[at])
        return grad_hidden, grad_weight.to(weight.dtype), *(None,) * 5
