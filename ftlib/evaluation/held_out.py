"""Loss on held-out documents."""

from collections.abc import Iterable

import torch
from torch import nn

from ftlib.layers.batch import Batch
from ftlib.losses.language_modelling import next_token_loss
from ftlib.parallel.run import Run


@torch.no_grad()
def loss(model: nn.Module, batches: Iterable[Batch], run: Run) -> float:
    """Mean -log p per target token over all `batches` of all processes; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        batch = run.share(batch).to(run.device)
        nll = next_token_loss(
            model(batch), model.lm_head.weight, batch.labels, batch.target_tokens, **model.logit_terms
        )
        total += torch.tensor((float(nll), batch.target_tokens), dtype=total.dtype)
    model.train(training)
    total = run.total(total.to(run.device))
    return float(total[0] / total[1])
