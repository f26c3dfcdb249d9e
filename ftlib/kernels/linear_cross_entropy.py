"""Head projection and cross-entropy in one op: the logits of all tokens never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
TILE_ELEMENTS = 256 * 1024 * 1024  # logits alive at a time; large tiles keep the matrix products efficient


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over targets of -log softmax(hidden @ weight^T)[label], a float32 scalar (float64 for float64 input).

    hidden [N, D]; weight [V, D]; labels [N] int64, -100 = no target. Rows without a target are left out before
    the product. Gradients are made in the forward pass, tile by tile, so each logit is computed once.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same sum through all logits at once: the oracle."""
    logits = hidden @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN001
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = (labels != IGNORE).nonzero(as_tuple=True)[0]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for tile in rows.split(max(1, TILE_ELEMENTS // weight.shape[0])):
            x, target = hidden[tile], labels[tile, None]
            logits = (x @ weight.T).to(wide)
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(1, target)).sum()
            if need_hidden or need_weight:
                grad = logits.sub_(lse).exp_()  # the logits are not needed again
                grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
                grad = grad.to(hidden.dtype)
                if need_hidden:
                    grad_hidden[tile] = grad @ weight
                if need_weight:
                    grad_weight += (grad.T @ x).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN001
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
