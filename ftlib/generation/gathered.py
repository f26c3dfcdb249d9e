"""A whole copy of a model whose weights lie on several processes: each of them draws alone, with a policy of all."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ftlib.adapters.lora import adapted
from ftlib.errors import UserError
from ftlib.models import LanguageModel
from ftlib.models.shards import unsharded
from ftlib.parallel.apply import reshard


class Gathered:
    """`model` does what `source`, sharded by FSDP2, does with adapter `name` on, and needs no other process for it.

    Its making and `refresh` are collective: every process of the run must come to them.
    """

    def __init__(self, source: LanguageModel, name: str = "policy") -> None:
        self.source, self.name = source, name
        with torch.device("meta"):
            made = LanguageModel(source.arch, source.table, source.config, _plain(type(source.model)))
        made.model.use_attention(source.model.backend)
        device = source.lm_head.weight.device
        plain = dict(made.named_modules())
        for key, module in self._modules():
            if key not in plain or module._buffers.keys() != plain[key]._buffers.keys():
                what, fix = f"{key} holds more than parameters", "set parallel.dp_replicate instead of dp_shard"
                raise UserError(f"a sharded model is drawn from where all is plain weights: {what}", fix=fix)
            target = plain[key]
            target._buffers.update(module._buffers)  # whole on every process, and never changed
            for own, value in module._parameters.items():
                copy = None if value is None else torch.empty(value.shape, dtype=value.dtype, device=device)
                target._parameters[own] = copy if copy is None else nn.Parameter(copy, requires_grad=False)
        made.tie()
        self.model = made.eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Weights as they are now, one after the other; adapters folded in in float32, rounded once."""
        reshard(self.source)  # what a forward left whole may be older than its parts
        folded = {key: factors for key, _, factors in adapted(self.source, self.name)}
        for key, module in self._modules():
            target = self.model.get_submodule(key)
            for own, value in module._parameters.items():
                if value is not None:
                    made = folded[key].merged(value) if key in folded and own == "weight" else value
                    target._parameters[own].copy_(unsharded(made))

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Those with parameters or buffers of their own, adapters aside."""
        found = ((key, module) for key, module in self.source.named_modules() if "adapters" not in key.split("."))
        return [(key, module) for key, module in found if module._parameters or module._buffers]


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that FSDP2 made a subclass of."""
    return next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
