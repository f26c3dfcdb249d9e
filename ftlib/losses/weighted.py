"""Cross-entropy with a weight for each token, made from its logits tile by tile: they never exist all at once."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftlib.kernels.linear_cross_entropy import TiledSum, tile_rows
from ftlib.sections.loss import Loss

Weigh = Callable[[Tensor, Tensor], Tensor]  # logits [n, V], -log p of the targets [n] -> weights [n], constants
EAFT_UNIT = 3.0  # what the authors' code divides the entropy by: about the most that 20 logits can have, log 20


def dft_weights(logits: Tensor, nll: Tensor) -> Tensor:
    """The target's probability (dynamic fine-tuning, Wu et al. 2025, arXiv 2508.05629, eq. 9)."""
    return torch.exp(-nll)


def eaft_weights(logits: Tensor, nll: Tensor, *, alpha: float = 1.0, k: int = 20) -> Tensor:
    """(H / 3)^alpha, H the entropy of a softmax over the k largest logits.

    Entropy-adaptive fine-tuning (arXiv 2601.02151): tokens of which the model is certain and wrong teach less.
    """
    top = logits.topk(min(k, logits.shape[-1]), -1).values.log_softmax(-1)
    entropy = -(top.exp() * top).sum(-1)
    return (entropy / EAFT_UNIT) ** alpha


def equal_weights(logits: Tensor, nll: Tensor) -> Tensor:
    """1 for every token."""
    return torch.ones_like(nll)


def weights_of(rule: Loss) -> Weigh:
    """The weighting that a config names."""
    if rule.name == "eaft":
        return partial(eaft_weights, alpha=rule.eaft_alpha, k=rule.eaft_k)
    return dft_weights if rule.name == "dft" else equal_weights


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weigh: Weigh = equal_weights,
    *,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
    targets: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum over targets of u (w * -log softmax(z)[label] + z_loss * logsumexp(z)^2).

    float32, or float64 for float64 input. hidden [N, D]; weight [V, D]; labels int64 [N], -100 = no target; z and
    `targets` as in `linear_cross_entropy`; w is what `weigh` makes of the logits; u is `weights` float32 [N], which the
    data bring, or 1. The z-loss keeps the softmax's normaliser near 1 (PaLM, Chowdhery et al. 2022, arXiv 2204.02311,
    section 5).
    """
    if isinstance(weight, DTensor):
        raise ValueError("a head that is split over processes has no weighted loss")
    return _Weighted.apply(hidden, weight, labels, weights, targets, weigh, z_loss, scale, softcap)


class _Weighted(TiledSum):
    """Gradients are made in the forward pass, as in `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        own: Tensor | None,
        targets: int | None,
        weigh: Weigh,
        z_loss: float,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)

        def differentiate(logits: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor | None]:
            at = labels[rows][:, None]
            z = logits.to(wide) * scale
            slope = scale
            if softcap is not None:
                bent = torch.tanh(z / softcap)
                z, slope = softcap * bent, scale * (1 - bent * bent)
            lse = z.logsumexp(-1)
            nll = lse - z.gather(1, at)[:, 0]
            weights, each = weigh(z, nll), None if own is None else own[rows].to(wide)
            part = weights * nll + z_loss * lse.square()
            grad = (z - lse[:, None]).exp_().mul_((weights + 2 * z_loss * lse)[:, None])
            grad.scatter_add_(1, at, -weights[:, None]).mul_(slope)
            return (part if each is None else each * part).sum(), grad.to(hidden.dtype), each

        return TiledSum.add_up(ctx, hidden, weight, labels, targets, tile_rows(hidden, weight), differentiate)
