"""Losses on tokens further ahead than the next."""

from typing import Any

from torch import Tensor

from ftlib.layers.batch import IGNORED, Batch
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models.language_model import LanguageModel
from ftlib.models.mtp import ahead
from ftlib.sections.loss import Loss


def multi_token_loss(model: LanguageModel, hidden: Tensor, batch: Batch, rule: Loss = Loss()) -> Tensor | float:
    """What multi-token prediction adds to a sum over targets: lambda / D times the sum over depths k = 1 … D of the
    loss of P^k(t_{i+k+1}) (DeepSeek-V3, arXiv 2412.19437, equations 21 to 25), float32 scalar; 0.0 without `model.mtp`.

    `hidden` [B, T, D] is what `model` gave for `batch`. A target counts at depth k where it and the tokens up to it lie
    in one document, with the weight that it has in the plain loss; the mean is over the targets of the plain loss at
    every depth, which is the paper's 1 / T. How many
    there are at a depth is counted on the device, which waits for it once a depth.
    """
    if model.mtp is None:
        return 0.0
    total = 0.0
    for k, depth in enumerate(model.mtp, 1):
        hidden = depth(model, hidden, ahead(batch.input_ids, batch.layout, k, 0), batch)
        labels = ahead(batch.labels, batch.layout, k, IGNORED)
        weights = None if batch.weights is None else ahead(batch.weights, batch.layout, k, 0)
        total = total + next_token_loss(hidden, model.lm_head.weight, labels, None, rule, weights, **model.logit_terms)
    return total * (model.mtp.weight / len(model.mtp))


class MultiToken:
    """`multi_token_loss` of the micro-batches of a step, and what it adds to the step's loss: the column `mtp_loss`."""

    def __init__(self, model: LanguageModel, rule: Loss) -> None:
        self.model, self.rule, self.seen = model, rule, 0.0

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor | float:
        """The part of the micro-batch that `model` has just computed, to be added to a sum over targets."""
        loss = multi_token_loss(self.model, hidden, batch, self.rule)
        if self.model.mtp is not None:
            self.seen = self.seen + loss.detach().double()
        return loss

    def column(self, run: Any, step: Any) -> dict[str, float]:
        """`mtp_loss` of the step that is over; every process must call it. `run` sums over processes (`Run.total`),
        `step` is the loader's and knows the target weight."""
        if self.model.mtp is None:
            return {}
        seen, self.seen = self.seen, 0.0
        return {"mtp_loss": run.total(seen).item() / step.target_weight}
