"""The pair of low-rank factors beside one linear layer (Hu et al. 2021, arXiv 2106.09685), DoRA's lengths with it.

PiSSA and OLoRA, which start from a part of W, subtract that part here instead of in W: the base is never changed,
switching the adapter off gives the model it was, and the pair is itself a plain adapter of twice the rank.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.adapters import initial
from ftlib.layers.linear import Linear
from ftlib.models.shards import fill
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
        stretch = self.magnitude / self.lengths(linear.weight)  # near 1, where half precision has steps of 0.4 %
        return (y + (stretch - 1) * base + stretch * low).to(y.dtype)

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
