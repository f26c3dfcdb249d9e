"""Fold an adapter into the weights it sits on."""

import torch
from torch import nn

from ftlib.adapters.lora import adapted


@torch.no_grad()
def merge_into(model: nn.Module, name: str = "policy") -> int:
    """W <- W + scale * B A for every adapted layer, computed in float32 at least, then the adapter is removed.

    Returns the number of layers merged. The sum is rounded to the weight's dtype once.
    """
    layers = list(adapted(model, name))
    for _, linear, factors in layers:
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        delta = factors.lora_B.to(wide) @ factors.lora_A.to(wide) * factors.scale
        linear.weight.copy_(linear.weight.to(wide) + delta)
        del linear.adapters[name]
        linear.active = None
    return len(layers)
