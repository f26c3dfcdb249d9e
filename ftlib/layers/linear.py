"""The linear layer every projection is made of, and the one place where sibling projections meet."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b, plus the active adapter's part when one is attached (ftlib.adapters).

    `active` is a plain attribute so that torch.compile guards on it: switching an adapter off recompiles
    once instead of silently keeping it on.
    """

    active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.active is None else y + self.adapters[self.active](x)


def project(linears: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """Each projection of the same input. Layers call this, never siblings one by one: fusion happens here."""
    return tuple(linear(x) for linear in linears)
