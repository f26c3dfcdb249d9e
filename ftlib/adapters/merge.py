"""Fold an adapter into the weights it sits on."""

import dataclasses

import torch
from torch import nn

from ftlib.adapters import saved_modules, token_rows
from ftlib.adapters.lora import adapted
from ftlib.errors import UserError


@torch.no_grad()
def merge_into(model: nn.Module, name: str = "policy") -> int:
    """W <- what W and the adapter do together for every adapted layer, and the modules and rows it trained; then the
    adapter is removed. Computed in float32 at least, rounded to the weight's dtype once.

    Returns the number of layers and modules changed. A head that was tied to the embedding and is trained is no
    longer tied.
    """
    layers, modules = list(adapted(model, name)), list(saved_modules.saved(model, name))
    if any("weight" not in linear._parameters for _, linear, _ in layers):
        raise UserError("a quantized base takes no adapter in", fix="merge it into the model the base was made from")
    fold(model, name)
    for _, linear, _ in layers:
        del linear.adapters[name]
        linear.active = None
    if any(hf.endswith(("embed_tokens", "lm_head")) for hf, _, _ in modules):
        _untie(model)
    for _, module, copies in modules:
        for key, p in copies._parameters.items():
            module._parameters[key].copy_(p)
        del module.adapters[name]
        module.active = None
    return len(layers) + len(modules) + token_rows.merge_into(model, name)


@torch.no_grad()
def fold(model: nn.Module, name: str = "policy") -> None:
    """W <- what W and the adapter do together, for every adapted layer; the adapter stays as it is. Computed in float32
    at least, rounded to the weight's dtype once. Every process of a sharded model must call this."""
    for _, linear, factors in adapted(model, name):
        linear.weight.copy_(factors.merged(linear.weight))


def _untie(model: nn.Module) -> None:
    if model.arch.tied:
        model.arch = dataclasses.replace(model.arch, tied=False)
        model.lm_head.weight = nn.Parameter(model.lm_head._parameters["weight"].clone(), requires_grad=False)
