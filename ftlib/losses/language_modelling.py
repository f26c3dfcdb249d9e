"""Next-token losses: pure tensor functions over hidden states."""

from torch import Tensor

from ftlib.kernels.linear_cross_entropy import linear_cross_entropy
from ftlib.losses.weighted import weighted_cross_entropy, weights_of
from ftlib.sections.loss import Loss


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: int | None = None,
    rule: Loss = Loss(),
    weights: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of w * -log p(label) over targets, float32 scalar, or what `rule` makes of it (ftlib.losses.weighted).

    hidden [B, T, D]; head [V, D], the output embedding; labels [B, T], already shifted, -100 = no target; `targets`,
    the number of others, saves a wait for the device when it is known (`Batch.target_tokens`). w is `weights` float32
    [B, T] (`Batch.weights`), whatever the rule, or 1. `scale` and `softcap` are the model's
    (`LanguageModel.logit_terms`).
    Divide by the sum of the weights of the whole optimizer step's targets (all micro-batches, all ranks:
    `Step.target_weight`): the gradient is then the same for every split of the batch.
    """
    weights = None if weights is None else weights.flatten()
    terms = {"weights": weights, "targets": targets, "scale": scale, "softcap": softcap}
    if not rule.plain:
        weigh = weights_of(rule)
        return weighted_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), weigh, z_loss=rule.z_loss, **terms)
    return linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), **terms)
