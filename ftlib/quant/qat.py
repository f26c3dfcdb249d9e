"""Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877): layers that compute as the quantized model will.

Weights and inputs are rounded in forward and taken for what they were in backward (Bengio et al. 2013, arXiv
1308.3432). With an adapter it is W + scale * B A that is rounded: the matrix that will be, once the adapter is merged.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear
from ftlib.quant.convert import replace
from ftlib.quant.schemes import SCHEMES, kept
from ftlib.sections import Qat, Rounding


def _straight(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)` to the bit, for x - x is 0; its gradient is handed to x as it is."""
    return rounded(x.detach()) + (x - x.detach())


class RoundedLinear(Linear):
    """y = x W^T + b; while `on`, with W (an adapter on it included) and x rounded.

    `on` is a plain attribute that compiled code guards on: switching it recompiles once.
    """

    on = False

    def __init__(self, linear: Linear, scheme: str, group: int, after: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name, self.scheme, self.group, self.after = scheme, SCHEMES[scheme], group, after
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return super().forward(x)
        weight = self.weight if self.active is None else self.adapters[self.active].merged(self.weight)
        weight = _straight(weight, lambda whole: self.scheme.weight(kept(whole, self.weight.dtype), self.group))
        weight = weight.to(self.weight.dtype)
        x = x if self.scheme.inputs is None else _straight(x, self.scheme.inputs)
        return F.linear(x, weight, self.bias)


def attach(model: nn.Module, section: Rounding, where: str) -> int:
    """Put RoundedLinear, not on yet, in place of every linear layer in the blocks; returns how many."""
    grouped = SCHEMES[section.scheme].grouped
    for name, module in model.model.layers.named_modules():
        if isinstance(module, ExpertLinear):
            what = f"layers.{name} is a stack of experts, and only linear layers are rounded and written so"
            raise UserError(what, where=f"{where}, model.path", fix="take a dense model")
        if grouped and isinstance(module, Linear) and module.in_features % section.inputs_a_scale:
            what = f"layers.{name} has {module.in_features} inputs, no multiple of {section.inputs_a_scale}"
            fix = f"a multiple of 8 that divides {module.in_features}, or scheme=fp8"
            raise UserError(what, where=f"{where}.group", fix=fix)
    after = section.after if isinstance(section, Qat) else 0
    return replace(
        model, lambda linear: RoundedLinear(linear, section.scheme, section.inputs_a_scale, after), lambda linear: True
    )


def rounded(model: nn.Module) -> list[RoundedLinear]:
    """The layers of a model that `attach` put there."""
    return [module for module in model.modules() if isinstance(module, RoundedLinear)]


def switch(model: nn.Module, on: bool) -> None:
    """Round from now on, or no longer."""
    for layer in rounded(model):
        layer.on = on


def at(step: int, model: nn.Module) -> None:
    """What a recipe says before step `step`: layers begin to round after so many steps as `qat.after` says."""
    for layer in rounded(model):
        layer.on = step > layer.after
