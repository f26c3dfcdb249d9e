"""Loss on held-out documents."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftlib.layers.batch import Batch
from ftlib.losses.language_modelling import next_token_loss
from ftlib.parallel.run import Run


@dataclass(frozen=True)
class Alone:
    """What `loss` reads of a `Run`, of one process without a process group: it holds every token."""

    device: torch.device

    def share(self, batch: Batch) -> Batch:
        return batch

    def total(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def loss(model: nn.Module, batches: Iterable[Batch], run: Run | Alone) -> float:
    """Mean -log p of the targets of all `batches` of all processes, weighted as in training: sum w * -log p / sum w.

    The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        batch = run.share(batch).to(run.device)
        hidden, head, terms = model(batch), model.lm_head.weight, model.logit_terms
        nll = next_token_loss(hidden, head, batch.labels, batch.target_tokens, weights=batch.weights, **terms)
        count = batch.target_tokens if batch.weights is None else float(batch.weights.sum(dtype=total.dtype))
        total += torch.tensor((float(nll), count), dtype=total.dtype)
    model.train(training)
    total = run.total(total.to(run.device))
    return float(total[0] / total[1])
