"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen model: attach, initialise, switch.

The base is never changed. PiSSA and OLoRA, which start from a part of W, subtract that part in the adapter instead of
in W: switching the adapter off gives the model it was, and the pair of factors is itself a plain adapter of twice the
rank.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.adapters import initial, saved_modules, targets, token_rows
from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear
from ftlib.models.shards import local_index
from ftlib.sections import Lora


class LoraFactors(nn.Module):
    """scale * B A x. `lora_A` [rank, in], `lora_B` [out, rank]; kept in float32, used in the input's dtype.

    DoRA adds `magnitude` [out]: row i of W + scale * B A is stretched to that length. A start inside W (PiSSA, OLoRA)
    adds buffers `start_A`, `start_B`, the factors before training, whose product is subtracted.
    """

    def __init__(self, linear: Linear, cfg: Lora, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__()
        made = {"device": linear.weight.device, "dtype": dtype}
        self.rank, self.alpha, self.dropout, self.init, self.rslora = rank, alpha, cfg.dropout, cfg.init, cfg.rslora
        self.scale = alpha / math.sqrt(rank) if cfg.rslora else alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **made))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, **made))
        magnitude = nn.Parameter(torch.empty(linear.out_features, **made)) if cfg.dora else None
        self.register_parameter("magnitude", magnitude)
        self.started = False  # whether `start_from_loss` was called
        moved = cfg.init in initial.FROM_WEIGHT
        self.over_inputs: Callable[[Tensor], Tensor] | None = None  # sums over the processes that share the inputs
        self.register_buffer("start_A", torch.empty_like(self.lora_A, requires_grad=False) if moved else None)
        self.register_buffer("start_B", torch.empty_like(self.lora_B, requires_grad=False) if moved else None)
        # Learning rates as multiples of the optimizer's (ftlib.optim): LoRA+, and the magnitudes with it, as peft.
        self.lr_scales = {"lora_B": cfg.lr_ratio, "magnitude": cfg.lr_ratio}

    @property
    def plain(self) -> bool:
        """Whether it is scale * B A x and no more, which fused kernels need."""
        return self.magnitude is None and self.start_A is None and self.dropout == 0

    @torch.no_grad()
    def start_from_loss(self, weight: Tensor, kept: Tensor) -> None:
        """LoftQ (Li et al. 2023, arXiv 2310.08659), one step: begin as the main part of what quantization took away."""
        a, b = initial.main_part(weight.float() - kept.float(), self.rank, self.scale)
        fill(self.stored("lora_A"), a)
        fill(self.stored("lora_B"), b)
        self.started = True

    def stored(self, name: str) -> Tensor | None:
        """A parameter or buffer as it is kept and saved; the attribute may be what this process computes with."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the whole change scale * B A, the subtracted start included (then r = 2 rank)."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, -self.start_B), 1)

    def forward(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        """The layer's output with the adapter, from its input and its output y = W x + b without."""
        dropping = self.dropout > 0 and self.training
        x = F.dropout(x, self.dropout) if dropping else x
        a, b = self.factors()
        low = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scale
        if self.magnitude is None:
            return y + low
        without = y if linear.bias is None else y - linear.bias
        base = F.linear(x, linear.weight) if dropping else without
        stretch = (self.magnitude / self.lengths(linear.weight)).to(x.dtype)
        return y + (stretch - 1) * base + stretch * low

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """Lengths [out] of the rows of W + scale * B A, never forming it; a constant to autograd (DoRA 4.3)."""
        a, b = self.factors()
        wide = torch.promote_types(a.dtype, torch.float32)  # sharding hands the factors over in bf16
        a, b = a.to(wide), b.to(wide)
        square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        cross = ((weight @ a.to(weight.dtype).T).to(wide) * b).sum(1)
        grown = square + self.scale * (2 * cross + self.scale * ((b @ (a @ a.T)) * b).sum(1))
        return (grown if self.over_inputs is None else self.over_inputs(grown)).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that does the work of W and the adapter, in float32 at least."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.factors()
        whole = weight.to(wide) + b.to(wide) @ a.to(wide) * self.scale
        if self.magnitude is None:
            return whole
        return whole * (self.magnitude.to(wide) / torch.linalg.vector_norm(whole, dim=1))[:, None]


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
    from ftlib.adapters.experts import ExpertFactors  # built on this module

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
                raise UserError(what, where="lora.init", fix="set model.quantize=nf4, or take another lora.init")
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

    A layer's draw depends on the seed and its name alone, so it is the same for every mesh, targets and order.
    """
    for layer_name, linear, factors in adapted(model, name):
        if factors.init == "loftq":
            if not factors.started:
                raise UserError("loftq needs the weights to be loaded after the adapter is there", where="lora.init")
            continue  # what loading the weights made of it
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{layer_name}".encode()))
        from_weight = factors.magnitude is not None or factors.start_A is not None
        weight = None
        if from_weight:
            weight = whole(linear.base.dequantize() if hasattr(linear, "base") else linear._parameters["weight"])
        a, b = initial.draw(factors.init, linear, len(factors.stored("lora_A")), factors.scale, weight, generator)
        fill(factors.stored("lora_A"), a)
        fill(factors.stored("lora_B"), b)
        if factors.start_A is not None:
            fill(factors.stored("start_A"), a)
            fill(factors.stored("start_B"), b)
        if factors.magnitude is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            fill(factors.stored("magnitude"), torch.linalg.vector_norm(weight, dim=1, dtype=wide))
    saved_modules.reset(model, name)
    token_rows.reset(model, name)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, which may hold only this process's part of it."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(value[local_index(parameter)])


@contextmanager
def use(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block, layers use adapter `name`; None: the frozen base alone, a reference policy for free."""
    modules = [m for m in model.modules() if isinstance(getattr(m, "adapters", None), nn.ModuleDict)]
    before = [module.active for module in modules]
    for module in modules:
        module.active = name if name in module.adapters else None
    try:
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module.active = active
