"""Losses on tokens further ahead than the next."""

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
