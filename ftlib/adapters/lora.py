"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen model: attach, initialise, switch."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ftlib.adapters import targets
from ftlib.layers.linear import Linear


class LoraFactors(nn.Module):
    """(alpha / rank) B A x. `lora_A` [rank, in], `lora_B` [out, rank]; kept in float32, used in the input's dtype."""

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        device = linear.weight.device
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        """scale * B A [out, in], in the factors' dtype."""
        return self.lora_B @ self.lora_A * self.scale


def attach(
    model: nn.Module,
    where: tuple[str, ...] | str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    name: str = "policy",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Freeze the model and put adapter `name` on the linear layers `where` names; returns their names.

    Works on the meta device. Call `reset` once the parameters have memory.
    """
    model.requires_grad_(False)
    found = targets.find(model, where)
    for linear in found.values():
        if not hasattr(linear, "adapters"):
            linear.adapters = nn.ModuleDict()
        linear.adapters[name] = LoraFactors(linear, rank, alpha, dropout, dtype)
        linear.active = name
    return list(found)


def adapted(model: nn.Module, name: str = "policy") -> Iterator[tuple[str, Linear, LoraFactors]]:
    """(layer name, layer, its factors) of every layer that carries adapter `name`."""
    for layer_name, module in model.named_modules():
        if isinstance(module, Linear) and name in getattr(module, "adapters", {}):
            yield layer_name, module, module.adapters[name]


@torch.no_grad()
def reset(model: nn.Module, seed: int, name: str = "policy") -> None:
    """A ~ kaiming uniform (a = sqrt 5), B = 0, as peft; a layer's draw depends on the seed and its name alone, so
    it is the same for every mesh, targets and order."""
    for layer_name, _, factors in adapted(model, name):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{layer_name}".encode()))
        whole = torch.empty(factors.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        fill(factors.lora_A, whole)
        factors.lora_B.zero_()


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, which may hold only this process's part of it."""
    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)


@contextmanager
def use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block, layers use adapter `name`; None: the frozen base alone, a reference policy for free."""
    linears = [m for m in model.modules() if isinstance(m, Linear) and hasattr(m, "adapters")]
    before = [linear.active for linear in linears]
    for linear in linears:
        linear.active = name if name in linear.adapters else None
    try:
        yield
    finally:
        for linear, active in zip(linears, before, strict=True):
            linear.active = active
