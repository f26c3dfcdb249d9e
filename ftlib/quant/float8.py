"""Layers whose products run in 8-bit floats: of a trained weight, and of a frozen one below an adapter."""

import torch
from torch import Tensor, nn

from ftlib.kernels.capability import FP8
from ftlib.kernels.fp8_linear import MULTIPLE, fp8_frozen_linear, fp8_linear, keep_in_graphs
from ftlib.layers.linear import Linear
from ftlib.quant.convert import replace
from ftlib.quant.frozen import QuantizedLinear


class Float8Linear(Linear):
    """y = x W^T + b with the product in fp8; W is kept, and trained, in its own dtype."""

    def __init__(self, linear: Linear, rows: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rows = linear.in_features, linear.out_features, rows
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = fp8_linear(x.flatten(0, -2), self.weight, self.rows).view(*x.shape[:-1], self.out_features)
        y = y if self.bias is None else y + self.bias
        return y if self.active is None else self.adapters[self.active](x, y, self)


class Float8Frozen(QuantizedLinear):
    """The same over codes that do not change: forward and the gradient of x in fp8, and no gradient of W at all.

    `turn`: also keep the codes transposed, as backward reads them; else they are transposed there each time.
    """

    def __init__(self, linear: Linear, rows: bool, turn: bool) -> None:
        super().__init__(linear, "fp8_turned" if turn else "fp8")
        self.rows = rows

    def product(self, x: Tensor) -> Tensor:
        codes, scales, *turned = self.base.parts
        y = fp8_frozen_linear(x.flatten(0, -2), codes, scales, turned[0] if turned else None, self.rows)
        return y.view(*x.shape[:-1], self.out_features)


def compute_in_fp8(model: nn.Module, rows: bool, smallest: int, frozen: bool, turn: bool = True) -> int:
    """Put one of these in place of each linear layer in the blocks whose sizes are multiples of 16 and not below
    `smallest`; returns how many. Load weights afterwards. `frozen`: the layers will not train."""
    keep_in_graphs()

    def fits(linear: Linear) -> bool:
        sizes = linear.in_features, linear.out_features
        return min(sizes) >= smallest and not any(size % MULTIPLE for size in sizes)

    return replace(
        model, lambda linear: Float8Frozen(linear, rows, turn) if frozen else Float8Linear(linear, rows), fits
    )


def supported(device: torch.device) -> bool:
    """Whether the device has these products; a CPU computes what they give."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8
