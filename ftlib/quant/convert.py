"""Quantized layers in place of a model's, and what plain weights are once they went through a format."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear
from ftlib.quant.experts import QuantizedExperts
from ftlib.quant.formats import FORMATS
from ftlib.quant.frozen import QuantizedLinear


def replace(
    model: nn.Module, make: Callable[[Any], nn.Module], fits: Callable[[Any], bool], kind: type[nn.Module] = Linear
) -> int:
    """Put `make(layer)` in place of each layer of `kind` in the blocks that `fits`; returns how many."""
    found = [(name, m) for name, m in model.model.layers.named_modules() if isinstance(m, kind) and fits(m)]
    for name, linear in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), leaf, make(linear))
    return len(found)


def hold(model: nn.Module, form: str) -> int:
    """Put quantized layers in place of every linear layer and stack of experts in the blocks; returns how many. Load
    weights afterwards.

    `form`: a name in FORMATS. The model may be on the meta device; adapters come after.
    """
    for name, layer in model.model.layers.named_modules():
        if not isinstance(layer, Linear | ExpertLinear):
            continue
        width, block = layer.weight.shape[-1], FORMATS[form].block
        if width % block:
            what = f"layers.{name} has {width} inputs, {form} needs a multiple of {block}"
            raise UserError(what, where="model.quantize", fix="int8 or fp8")

    def plain(layer: nn.Module) -> bool:
        return not hasattr(layer, "base")

    count = replace(model, lambda linear: QuantizedLinear(linear, form), plain)
    return count + replace(model, lambda stack: QuantizedExperts(stack, form), plain, ExpertLinear)


def kept_in(model: nn.Module) -> str | None:
    """What matrices in the blocks are kept in: as `round_through` takes it where all are; "fp8 in some layers" (say)
    where others are plain, as `model.fp8` leaves small ones and experts; None where all are."""
    layers = [m for m in model.model.layers.modules() if isinstance(m, Linear | ExpertLinear)]
    forms = {layer.base.form.removesuffix("_turned") if hasattr(layer, "base") else None for layer in layers}
    named = " and ".join(sorted(forms - {None}))
    return named + " in some layers" * (None in forms) if named else None


@torch.no_grad()
def round_through(model: nn.Module, form: str | None) -> None:
    """Give every linear layer in the blocks of a model with plain weights those that `form`, if there is one, keeps of
    them: the base that an adapter saw, where it was trained on a quantized one."""
    for linear in model.model.layers.modules():
        if form is not None and isinstance(linear, Linear | ExpertLinear):
            rows = linear._parameters["weight"].flatten(0, -2)  # the attribute may be what an adapter trains instead
            rows.copy_(FORMATS[form].dequantize(*FORMATS[form].quantize(rows).values(), rows.dtype))
