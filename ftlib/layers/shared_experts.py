"""Experts that every token goes through, beside those a router picks for it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Shared experts (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066, section 3.2) as one gated feed-forward layer,
    `hidden` wide, whose output is added to the routed sum."""

    hidden: int
    gated: bool = False  # times a sigmoid of the token, as Qwen1.5-MoE has it

    @property
    def name(self) -> str:
        """What checkpoints call the layer."""
        return "shared_expert" if self.gated else "shared_experts"


class SharedGate(nn.Module):
    """How much of the shared expert each token gets: [N, D] -> [N, 1], between 0 and 1.

    Part of the routing: as a router it takes no adapter and is never kept in few bits.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid()
