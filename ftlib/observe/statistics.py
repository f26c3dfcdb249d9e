"""Sizes of gradients and weights, by kind of parameter."""

import re

import torch
from torch import Tensor, nn

from ftlib.models.shards import unsharded

LAYER = re.compile(r"(^|\.)layers\.\d+\.")


def statistics(model: nn.Module) -> dict[str, float]:
    """`grad_norm/<kind>` and `weight_norm/<kind>` of trained parameters, over all layers; before the optimizer's step.

    A kind is a parameter's name without the number of its layer. Collective where parameters are sharded; one wait for
    the device.
    """
    sums: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            pair = torch.stack([_squared(p.grad, p), _squared(p, p)])
            sums.setdefault(LAYER.sub(r"\1layers.*.", name), []).append(pair)
    if not sums:
        return {}
    norms = torch.stack([torch.stack(pairs).sum(0) for pairs in sums.values()]).sqrt().tolist()
    found = {f"grad_norm/{kind}": grad for kind, (grad, _) in zip(sums, norms, strict=True)}
    return found | {f"weight_norm/{kind}": weight for kind, (_, weight) in zip(sums, norms, strict=True)}


def _squared(x: Tensor | None, like: Tensor) -> Tensor:
    if x is None:
        return torch.zeros((), device=like.device)
    return unsharded(x.detach().float().square().sum())
