"""More rows for new tokens in the embedding and the head, and training those rows alone."""

import dataclasses

import torch
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.models.language_model import LanguageModel


@torch.no_grad()
def resize_embeddings(model: LanguageModel, rows: int, multiple_of: int = 1) -> slice:
    """Give embedding and head at least `rows` rows, a multiple of `multiple_of`; returns the new ones.

    A new row is the mean of the old ones: no token is then more likely than any other new one, and none is an outlier.
    Ties, dtype, device and config.json follow. Call it on plain weights, before sharding and before the optimizer is
    made. UserError if there would be fewer rows than now; models are often made with spare rows, which are kept.
    """
    old = model.model.embed_tokens.weight.shape[0]
    wanted = -(-rows // multiple_of) * multiple_of
    if wanted < old and multiple_of > 1:
        raise UserError(f"the model has {old:,} embedding rows, which {wanted:,} would cut", where="tokenizer")
    if wanted <= old:
        return slice(old, old)
    embedding = model.model.embed_tokens
    embedding.weight = _longer(embedding.weight, wanted)
    embedding.num_embeddings = wanted
    if model.arch.tied:
        model.lm_head.weight = embedding.weight
    else:
        model.lm_head.weight = _longer(model.lm_head.weight, wanted)
    model.lm_head.out_features = wanted
    model.arch = dataclasses.replace(model.arch, vocab=wanted)
    model.model.arch = model.arch
    model.config = {**model.config, "vocab_size": wanted}
    return slice(old, wanted)


def train_rows(model: LanguageModel, rows: slice) -> list[nn.Parameter]:
    """Let embedding and head learn in `rows` alone: the gradient of every other row is zero.

    The optimizer must not decay these parameters (a group with weight_decay 0), or the other rows would shrink.
    """
    weights = [model.model.embed_tokens.weight, *([] if model.arch.tied else [model.lm_head.weight])]
    for weight in weights:
        weight.requires_grad_(True)
        weight.register_hook(lambda grad: _only(grad, rows))
    return weights


def _longer(weight: nn.Parameter, rows: int) -> nn.Parameter:
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    grown = torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
    return nn.Parameter(grown, requires_grad=weight.requires_grad)


def _only(grad: Tensor, rows: slice) -> Tensor:
    kept = torch.zeros_like(grad)
    kept[rows] = grad[rows]
    return kept
