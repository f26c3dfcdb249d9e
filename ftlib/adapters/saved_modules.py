"""Modules that an adapter trains whole (`lora.modules_to_save`): each adapter has its own copy of their parameters.

The copy sits where factors sit, under `adapters.<name>`, and the module's `weight` and `bias` are those of the active
adapter: whoever reads `lm_head.weight` gets the right one, and switching the adapter off gives the base again.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.errors import UserError, did_you_mean
from ftlib.models.keys import Table, piece


class Copies(nn.Module):
    """An adapter's own parameters of one module, under the module's names for them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        for name, p in module._parameters.items():
            if p is not None:
                self.register_parameter(name, nn.Parameter(torch.empty(p.shape, device=p.device, dtype=dtype)))

    def value(self, name: str, base: Tensor) -> Tensor:
        """What the module computes with in place of its own parameter."""
        return getattr(self, name).to(base.dtype)

    def forward(self, x: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
        """Nothing to add: `y` was already computed with these parameters."""
        return y


def attach(model: nn.Module, names: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    """Give adapter `name` its own copies of the modules whose Hugging Face names end in one of `names`, at a dot."""
    modules = candidates(model)
    for wanted in names:
        hits = [module for hf, module in modules.items() if hf == wanted or hf.endswith(f".{wanted}")]
        if not hits:
            hint = did_you_mean(wanted, {hf.rsplit(".", 1)[-1] for hf in modules})
            raise UserError(f"no module with parameters is named {wanted!r}{hint}", where="lora.modules_to_save")
        for module in hits:
            if name in getattr(module, "adapters", {}):
                raise UserError(
                    f"{wanted!r} is trained whole and has low-rank factors too",
                    where="lora.modules_to_save, lora.targets",
                    fix="leave it out of one of them",
                )
            if hasattr(module, "base"):
                raise UserError(
                    f"{wanted!r} is kept in few bits, from which it cannot be trained whole",
                    where="lora.modules_to_save, model.quantize, model.fp8",
                    fix="name it in lora.targets instead, or leave model.quantize and model.fp8 out",
                )
            switch(module)
            module.adapters[name] = Copies(module, dtype)
            module.active = name


def switch(module: nn.Module) -> None:
    """Let a module without adapters read its parameters from the one that is on."""
    if not hasattr(module, "adapters"):
        module.__class__ = _switching(type(module), tuple(module._parameters))
        module.adapters = nn.ModuleDict()


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Hugging Face name -> module, of every module with parameters of its own, or a matrix in few bits."""
    table = getattr(model, "table", Table())
    found = {}
    for name, module in model.named_modules():
        first = next(iter(module._parameters), "weight" if hasattr(module, "base") else None)
        if first is not None and ".adapters." not in name:
            found[piece(f"{name}.{first}", table).hf.rsplit(".", 1)[0]] = module
    return found


def saved(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Copies]]:
    """(Hugging Face name, module, its copies) of every module that adapter `name` trains whole."""
    for hf, module in candidates(model).items():
        if name in getattr(module, "adapters", {}) and isinstance(module.adapters[name], Copies):
            yield hf, module, module.adapters[name]


@torch.no_grad()
def reset(model: nn.Module, name: str) -> None:
    """Fill the copies of adapter `name` from the base."""
    for _, module, copies in saved(model, name):
        for key, p in copies._parameters.items():
            p.copy_(module._parameters[key])


def waits(tensor: DTensor) -> bool:
    """Whether a sharded tensor is still to be gathered by FSDP2; one on the tensor-parallel axis alone is not."""
    return tensor.device_mesh.mesh_dim_names != ("tp",)


@cache
def _switching(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """`kind` with each parameter in `names` as the active adapter has it, in the base's dtype."""

    def chosen(name: str) -> property:
        def get(self: nn.Module) -> Tensor | None:
            base = self._parameters[name]
            # Sharded over data ranks: not computed with yet, and FSDP2 asks for the parameter by its attribute.
            if base is None or self.active is None or (isinstance(base, DTensor) and waits(base)):
                return base
            return self.adapters[self.active].value(name, base)

        return property(get)

    def embed(self: nn.Module, tokens: Tensor) -> Tensor:
        adapter = None if self.active is None else self.adapters[self.active]
        if hasattr(adapter, "embed"):  # has some rows of its own, and need not copy the others
            return adapter.embed(tokens, self._parameters["weight"])
        return kind.forward(self, tokens)

    lookup = {"forward": embed} if issubclass(kind, nn.Embedding) else {}
    return type(kind.__name__, (kind,), {"active": None, **lookup} | {name: chosen(name) for name in names})
