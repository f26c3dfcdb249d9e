"""Which linear layers, stacks of experts among them, an adapter goes on."""

import re

from torch import nn

from ftlib.errors import UserError, did_you_mean
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear


def find(model: nn.Module, targets: tuple[str, ...] | str) -> dict[str, Linear | ExpertLinear]:
    """Linear layers by name.

    `all-linear`: every one inside the blocks (not the head); a tuple: names that end in one of them, at a dot;
    any other string: a regular expression that must match the whole name, as peft reads it.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear | ExpertLinear)}
    if targets == "all-linear":
        return {name: module for name, module in linears.items() if not name.endswith("lm_head")}
    if isinstance(targets, str):
        try:
            found = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
        except re.error as error:
            raise UserError(f"{targets!r} is no regular expression: {error}", where="lora.targets") from None
        if not found:
            leaf = any(name.endswith(f".{targets}") for name in linears)
            named = f"a text is a pattern of whole names; a name goes into a list: [{targets}]"
            fix = named if leaf else _choices(linears)
            raise UserError(f"no linear layer matches {targets!r}", where="lora.targets", fix=fix)
        return found
    found = {}
    for target in targets:
        hits = {name: m for name, m in linears.items() if name == target or name.endswith(f".{target}")}
        if not hits:
            leaves = {name.rsplit(".", 1)[-1] for name in linears}
            hint = did_you_mean(target, leaves)
            raise UserError(f"no linear layer is named {target!r}{hint}", where="lora.targets", fix=_choices(linears))
        found |= hits
    return {name: linears[name] for name in linears if name in found}


def _choices(linears: dict[str, Linear | ExpertLinear]) -> str:
    return "names here: " + ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears})) + ", or all-linear"
