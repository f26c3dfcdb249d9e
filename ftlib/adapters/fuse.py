"""Let sibling projections share one matrix product with their adapters, on an unsharded GPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftlib.adapters.factors import LoraFactors
from ftlib.kernels.fp8_linear import fp8_frozen_linear
from ftlib.kernels.lora_linear import gated, lora_project
from ftlib.layers.attention import Attention
from ftlib.layers.linear import Linear
from ftlib.layers.mlp import GatedMlp, PlainMlp
from ftlib.quant import QuantizedLinear
from ftlib.quant.float8 import Float8Frozen
from ftlib.quant.fused import frozen_lora_project


class Gate:
    """The switch of a model's fused adapters, which code reads from the device: one piece of it serves on and off.

    A policy whose adapter does nothing yet gives what its reference gives to the bit, as compiled code of its own for
    the latter may not: a compiler measures which of several ways of summing is the fastest, each time it compiles.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.on, self.value = name, True, torch.ones((), device=device)

    def turn(self, on: bool) -> None:
        """Switch the adapters on or off."""
        self.on = on
        self.value.fill_(float(on))


class Fused:
    """Siblings over one input, computed with their adapters by `product(x [N, D])` -> [N, O], side by side."""

    product: Callable[[Tensor], Tensor]

    def __init__(self, linears: list[Linear], gate: Gate) -> None:
        self.linears, self.name, self.gate = linears, gate.name, gate.value
        self.factors: list[LoraFactors] = [linear.adapters[gate.name] for linear in linears]
        self.scale = self.factors[0].scale
        self.outs = [linear.out_features for linear in linears]
        linears[0].fused = self
        for linear in linears:
            linear.gate = gate

    @property
    def lora(self) -> tuple[list[Tensor], list[Tensor]]:
        """lora_A and lora_B of each layer: the parameters."""
        return [f.lora_A for f in self.factors], [f.lora_B for f in self.factors]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Outputs of the layers; None when another adapter is switched on, or some."""
        if any(linear.active != self.name for linear in self.linears):
            return None
        return self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1).split(self.outs, -1)


class FusedLora(Fused):
    """Weights and adapters in one buffer (ftlib.kernels.lora_linear).

    The layers' `weight` parameters become views of the buffer, so nothing is held twice. The factors stay parameters of
    their own; `views` are the buffer's copies of them, brought up to date before each forward.
    """

    def __init__(self, linears: list[Linear], gate: Gate) -> None:
        super().__init__(linears, gate)
        weight = linears[0].weight
        dim, rank = linears[0].in_features, sum(f.rank for f in self.factors)
        self.stacked = weight.new_zeros(sum(self.outs) + rank, dim + rank, requires_grad=False)
        self.views: list[Tensor] = []
        row, column = 0, 0
        for linear, factors in zip(linears, self.factors, strict=True):
            view = self.stacked[row : row + linear.out_features, :dim]
            view.copy_(linear.weight.detach())
            linear.weight = nn.Parameter(view, requires_grad=False)
            below = sum(self.outs) + column
            self.views.append(self.stacked[below : below + factors.rank, :dim])
            self.views.append(self.stacked[row : row + linear.out_features, dim + column : dim + column + factors.rank])
            row, column = row + linear.out_features, column + factors.rank

    def product(self, x: Tensor) -> Tensor:
        return lora_project(x, self.stacked, *self.lora, self.scale, self.gate)


class FusedQuantized(Fused):
    """Weights in few bits: the buffer is made for each product (ftlib.quant.fused)."""

    def product(self, x: Tensor) -> Tensor:
        bases = [linear.base for linear in self.linears]
        parts = [part for base in bases for part in base.parts]
        terms = {"gate": self.gate, "once": self.linears[0].recomputed}
        return frozen_lora_project(x, parts, bases[0].form, *self.lora, self.scale, **terms)


class FusedFloat8(Fused):
    """Frozen codes in one buffer, multiplied in fp8, the input cast once; the adapters' products stay in its dtype."""

    def __init__(self, linears: list[Float8Frozen], gate: Gate) -> None:
        super().__init__(linears, gate)
        self.rows = linears[0].rows
        self.parts = [torch.cat(same) for same in zip(*(linear.base.parts[:2] for linear in linears), strict=True)]
        self.turned = None
        if len(linears[0].base.parts) > 2:
            self.turned = torch.cat([linear.base.turned for linear in linears], 1)
        row = 0
        for linear in linears:  # views: nothing is held twice
            mine = slice(row, row + linear.out_features)
            linear.base.codes, linear.base.scales = (part[mine] for part in self.parts)
            if self.turned is not None:
                linear.base.turned = self.turned[:, mine]
            row = mine.stop

    def product(self, x: Tensor) -> Tensor:
        lora_a, lora_b = self.lora
        low = gated((x @ torch.cat(lora_a).to(x.dtype).T) * self.scale, self.gate)
        y = fp8_frozen_linear(x, *self.parts, self.turned, self.rows)
        return y + low @ torch.block_diag(*lora_b).to(x.dtype).T


def fuse(model: nn.Module, name: str = "policy") -> int:
    """Fuse every group of siblings whose layers all carry a plain adapter `name` and no bias; returns how many.

    For weights in memory on one device, unsharded: call it after loading. The copies of the factors are refreshed by
    a hook before each forward of the first block, where a recorded pass has it too (ftlib.parallel.graphs). Between a
    pass and its backward no other pass comes, nor a turn of the gate (autograd says so): what a policy is compared with
    is computed before it.
    """
    groups = []
    for module in model.modules():
        if isinstance(module, Attention):
            groups += [[module.q_proj, module.k_proj, module.v_proj], [module.o_proj]]
        elif isinstance(module, GatedMlp):
            groups += [[module.gate_proj, module.up_proj], [module.down_proj]]
        elif isinstance(module, PlainMlp):
            groups += [[module.up_proj], [module.down_proj]]
    groups = [linears for linears in groups if _fits(linears, name)]
    kinds = {Float8Frozen: FusedFloat8, QuantizedLinear: FusedQuantized}
    gate = Gate(name, next(model.parameters()).device)
    fused = [kinds.get(type(linears[0]), FusedLora)(linears, gate) for linears in groups]
    plain = [group for group in fused if isinstance(group, FusedLora)]
    copies = [view for group in plain for view in group.views]
    factors = [p for group in plain for f in group.factors for p in (f.lora_A, f.lora_B)]

    def refresh(*_: object) -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, factors)

    if plain:
        model.model.layers[0].register_forward_pre_hook(refresh)
    return len(fused)


def _fits(linears: list[Linear], name: str) -> bool:
    kinds = {type(linear) for linear in linears}
    if len(kinds) > 1 or not kinds <= {Linear, QuantizedLinear, Float8Frozen}:
        return False
    if any(linear.bias is not None or name not in getattr(linear, "adapters", {}) for linear in linears):
        return False
    factors = [linear.adapters[name] for linear in linears]
    return all(isinstance(f, LoraFactors) and f.plain and f.scale == factors[0].scale for f in factors)
