"""The linear layer every projection is made of, and the one place where sibling projections meet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b, plus the active adapter's part when one is attached (ftlib.adapters).

    `active` is a plain attribute so that torch.compile guards on it: switching an adapter off recompiles
    once instead of silently keeping it on. `fused`, on the first of some siblings, computes all of them at once
    (ftlib.adapters.fuse), or declines with None; `gate` switches its adapters off while they stay active.
    """

    active: str | None = None
    gate: Any = None
    fused: Callable[[Tensor], tuple[Tensor, ...] | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.active is None else self.adapters[self.active](x, y, self)


def project(linears: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """Each projection of the same input. Layers call this, never a Linear itself: fusion happens here."""
    fused = linears[0].fused
    if fused is not None and (outputs := fused(x)) is not None:
        return outputs
    return tuple(linear(x) for linear in linears)
