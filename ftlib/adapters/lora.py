"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen model: attach, initialise, switch."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftlib.adapters import initial, saved_modules, targets, token_rows
from ftlib.adapters.experts import ExpertFactors
from ftlib.adapters.factors import LoraFactors
from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear
from ftlib.models.shards import fill, unsharded
from ftlib.sections import Lora


def attach(
    model: nn.Module,
    where: tuple[str, ...] | str,
    *,
    name: str = "policy",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[str]:
    """Freeze the model and put adapter `name` on the linear layers `where` names; returns their names.

    `options` are keys of `ftlib.sections.Lora`. Works on the meta device. Call `reset` once the parameters have memory.
    """
    return attach_section(model, Lora(targets=where, **options), name=name, dtype=dtype)


def attach_section(
    model: nn.Module,
    cfg: Lora,
    *,
    name: str = "policy",
    dtype: torch.dtype = torch.float32,
    tokens: token_rows.Where | None = None,
) -> list[str]:
    """`attach` from a config's section. `tokens`: rows of the embedding and the head that train as well."""
    model.requires_grad_(False)
    found = targets.find(model, cfg.targets)
    for pattern in [*cfg.rank_pattern, *cfg.alpha_pattern]:
        if not any(ends(pattern, layer) for layer in found):
            raise UserError(f"no adapted layer's name ends in {pattern!r}", where="lora.rank_pattern, alpha_pattern")
    for layer, linear in found.items():
        if not hasattr(linear, "adapters"):
            linear.adapters = nn.ModuleDict()
        rank = next((r for pattern, r in cfg.rank_pattern.items() if ends(pattern, layer)), cfg.rank)
        alpha = next((a for pattern, a in cfg.alpha_pattern.items() if ends(pattern, layer)), cfg.alpha)
        if cfg.init in initial.FROM_WEIGHT and rank > min(linear.in_features, linear.out_features):
            raise UserError(f"{layer} has no {rank} main directions", where="lora.rank, lora.init", fix="a lower rank")
        make = ExpertFactors if isinstance(linear, ExpertLinear) else LoraFactors
        linear.adapters[name] = make(linear, cfg, rank, alpha, dtype)
        linear.active = name
        if cfg.init == "loftq":
            if not hasattr(linear, "base"):
                what = f"loftq begins with what quantization loses, and {layer} is not quantized"
                fix = "take another lora.init, or set model.quantize=nf4 (which goes with no qat)"
                raise UserError(what, where="lora.init", fix=fix)
            linear.base.lost = linear.adapters[name].start_from_loss
    saved_modules.attach(model, cfg.modules_to_save, name, dtype)
    if tokens:
        token_rows.attach(model, tokens, name, dtype)
    return list(found)


def ends(pattern: str, layer: str) -> bool:
    """Whether the end of a layer's name, from a dot on, matches the regular expression, as peft reads patterns."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}", where="lora.rank_pattern") from None


def adapted(model: nn.Module, name: str = "policy") -> Iterator[tuple[str, Linear, LoraFactors]]:
    """(layer name, layer, its factors) of every layer that carries adapter `name`."""
    for layer_name, module in model.named_modules():
        if isinstance(module, Linear | ExpertLinear) and name in getattr(module, "adapters", {}):
            factors = module.adapters[name]
            if isinstance(factors, LoraFactors):
                yield layer_name, module, factors


@torch.no_grad()
def reset(model: nn.Module, seed: int, name: str = "policy") -> None:
    """Fresh factors by `lora.init`, magnitudes and saved modules as in the base: the model's output does not change.

    A layer's draw depends on the seed and its name alone (`dice`), so it is the same for every mesh, targets and order.
    """
    for layer_name, linear, factors in adapted(model, name):
        if factors.init == "loftq":
            if not factors.started:
                raise UserError("loftq needs the weights to be loaded after the adapter is there", where="lora.init")
            continue  # what loading the weights made of it
        from_weight = factors.magnitude is not None or factors.start_A is not None
        weight = None
        if from_weight:
            weight = unsharded(linear.base.dequantize() if hasattr(linear, "base") else linear._parameters["weight"])
        a, b = begin(linear, factors, weight, dice(f"{seed}:{layer_name}"))
        if factors.start_A is not None:
            fill(factors.stored("start_A"), a)
            fill(factors.stored("start_B"), b)
        if factors.magnitude is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            fill(factors.stored("magnitude"), torch.linalg.vector_norm(weight, dim=1, dtype=wide))
    saved_modules.reset(model, name)
    token_rows.reset(model, name)


def begin(
    linear: Linear, factors: LoraFactors, weight: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Give a layer's factors their first values, and return them whole (`initial.draw`)."""
    a, b = initial.draw(factors.init, linear, len(factors.stored("lora_A")), factors.scale, weight, generator)
    fill(factors.stored("lora_A"), a)
    fill(factors.stored("lora_B"), b)
    return a, b


def dice(text: str) -> torch.Generator:
    """A generator of its own for what `text` names."""
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


@contextmanager
def use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block, layers use adapter `name`; None: the frozen base alone, a reference policy for free."""
    modules = [m for m in model.modules() if isinstance(getattr(m, "adapters", None), nn.ModuleDict)]
    gates = {id(gate): gate for m in modules if (gate := getattr(m, "gate", None))}.values()
    before = [module.active for module in modules], [gate.on for gate in gates]
    for module in modules:
        gate = getattr(module, "gate", None)
        wanted = gate.name if name is None and gate is not None else name  # behind a shut gate
        module.active = wanted if wanted in module.adapters else None
    for gate in gates:
        gate.turn(name is not None)
    try:
        yield
    finally:
        for module, active in zip(modules, before[0], strict=True):
            module.active = active
        for gate, on in zip(gates, before[1], strict=True):
            gate.turn(on)
