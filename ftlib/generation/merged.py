"""A side copy of a model with its adapter folded in: faster to draw from, and the base is never touched."""

import torch
from torch import nn

from ftlib.adapters import saved_modules
from ftlib.adapters.lora import adapted
from ftlib.errors import UserError
from ftlib.generation.steps import sharded
from ftlib.models import LanguageModel


class Merged:
    """`model` does what `source` does with adapter `name` on. Only the weights under the adapter are held twice."""

    def __init__(self, source: LanguageModel, name: str = "policy") -> None:
        self.source, self.name = source, name
        layers = {layer for layer, _, _ in adapted(source, name)}
        rest = any(name in getattr(m, "adapters", {}) for key, m in source.named_modules() if key not in layers)
        whole = all("weight" in linear._parameters for _, linear, _ in adapted(source, name))
        if rest or not whole or sharded(source) or any(saved_modules.saved(source, name)):
            raise UserError(
                "an adapter is merged for drawing only where it is low-rank factors on plain weights of one process",
                fix="leave it live",
            )
        with torch.device("meta"):
            made = LanguageModel(source.arch, source.table, source.config, type(source.model))
        made.model.use_attention(source.model.backend)
        for key, module in source.named_modules():
            if ".adapters." in f".{key}." or key.endswith(".adapters"):
                continue
            target = made.get_submodule(key)
            target._parameters.update(module._parameters)
            target._buffers.update(module._buffers)
            if key in layers:
                own = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=module.weight.device)
                target.weight = nn.Parameter(own, requires_grad=False)
            if "forward" in vars(module):  # an embedding that is read out of host memory
                target.forward = module.forward
        self.model = made.eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the factors in as they are now: W + scale * B A from the untouched W, in float32, rounded once."""
        for key, linear, factors in adapted(self.source, self.name):
            self.model.get_submodule(key).weight.copy_(factors.merged(linear.weight))
