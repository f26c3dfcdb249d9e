"""Adapters on stacks of experts: a pair of factors for each expert, kept as PEFT keeps them."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ftlib.adapters.factors import LoraFactors
from ftlib.errors import UserError
from ftlib.kernels.grouped_linear import grouped_linear
from ftlib.layers.moe import ExpertLinear
from ftlib.sections import Lora

WHOLE = (Replicate(), Shard(0))  # placements of a stack that cut no expert


class ExpertFactors(LoraFactors):
    """scale * B_e A_e x for each expert e. `lora_A` [experts * rank, in], expert by expert; `lora_B` [out, rank *
    experts], the experts of one rank side by side."""

    def __init__(self, stack: ExpertLinear, cfg: Lora, rank: int, alpha: float, dtype: torch.dtype) -> None:
        wrong = {"dropout": cfg.dropout > 0, "dora": cfg.dora, "init": cfg.init in ("pissa", "olora", "loftq")}
        if any(wrong.values()):
            raise UserError(
                f"lora.{next(key for key, value in wrong.items() if value)} does not work on stacked experts",
                where="lora",
                fix="leave it out, or leave the experts out of lora.targets: [q_proj, k_proj, v_proj, o_proj]",
            )
        super().__init__(stack, cfg, rank, alpha, dtype)
        self.experts, self.transposed, self.parts = stack.experts, stack.transposed, stack.parts
        made = {"device": stack.weight.device, "dtype": dtype}
        self.lora_A = torch.nn.Parameter(torch.empty(stack.experts * rank, stack.in_features, **made))
        self.lora_B = torch.nn.Parameter(torch.empty(stack.out_features, rank * stack.experts, **made))

    plain = False  # kernels that fuse dense layers cannot take it

    def stacks(self) -> tuple[Tensor, Tensor]:
        """A [experts, rank, in] and B [experts, out, rank]."""
        a, b = _replicated(self.lora_A), _replicated(self.lora_B)
        b = b.unflatten(1, (self.rank, self.experts)).permute(2, 0, 1)
        return a.unflatten(0, (self.experts, self.rank)), b

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [N, in], sorted by expert, whose runs end at `ends`. Returns what the adapter adds, [N, out]."""
        a, b = self.stacks()
        low = grouped_linear(x, a.to(x.dtype), ends)
        return grouped_linear(low, b.to(x.dtype), ends) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The stack that does the work of `weight` and the adapter, in float32 at least. Where whole experts lie on
        each process (FSDP2), it computes the change of its own alone."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(wide) for factor in self.stacks())
        if isinstance(weight, DTensor) and all(type(p) in (Replicate, Shard) and p in WHOLE for p in weight.placements):
            a, b = (factor.redistribute(placements=weight.placements) for factor in (a, b))
        change = b @ a * self.scale
        change = change.mT if self.transposed else change
        if self.parts > 1:
            change = change.unflatten(2 if self.transposed else 1, (self.parts, -1))
        return weight.to(wide) + change


def _replicated(factor: Tensor) -> Tensor:
    """Where FSDP2 has shared out its rows, which need not be whole experts': all of it on each process."""
    if not isinstance(factor, DTensor):
        return factor
    return factor.redistribute(placements=[Replicate()] * factor.device_mesh.ndim)
