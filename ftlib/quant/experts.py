"""Stacks of experts whose frozen matrices are stored in fewer bits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ftlib.kernels.grouped_linear import grouped_linear
from ftlib.layers.moe import ExpertLinear
from ftlib.quant.formats import FORMATS
from ftlib.quant.frozen import FrozenWeight, OnFrozenWeight


class QuantizedExperts(OnFrozenWeight, ExpertLinear):
    """As ExpertLinear, its stack kept as `base` and made whole for each product, forward and backward."""

    def __init__(self, stack: ExpertLinear, form: str) -> None:
        nn.Module.__init__(self)
        self.experts, self.transposed, self.bias = stack.experts, stack.transposed, stack.bias
        self.in_features, self.out_features, self.parts = stack.in_features, stack.out_features, stack.parts
        weight = stack.weight
        self.base = FrozenWeight(weight.shape, form, weight.device, weight.dtype)
        self.train(stack.training)

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        base, bias = self.base, None if self.bias is None else self.bias.flatten(1)
        kept = base.local_shape
        inputs = kept[1 if self.transposed else -1]
        outputs = kept[1:].numel() // inputs
        shape = [self.experts, *((inputs, outputs) if self.transposed else (outputs, inputs))]
        return torch.ops.ftlib.frozen_grouped_linear(x, ends, bias, base.parts, base.form, shape, self.transposed)


@torch.library.custom_op("ftlib::frozen_grouped_linear", mutates_args=())
def _frozen_grouped(
    x: Tensor, ends: Tensor, bias: Tensor | None, parts: Sequence[Tensor], form: str, shape: Sequence[int],
    transposed: bool,
) -> Tensor:  # fmt: skip
    weight = FORMATS[form].dequantize(*parts, x.dtype).view(*shape)
    return grouped_linear(x, weight.mT if transposed else weight, ends, bias)


@_frozen_grouped.register_fake
def _(
    x: Tensor, ends: Tensor, bias: Tensor | None, parts: Sequence[Tensor], form: str, shape: Sequence[int],
    transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], shape[2 if transposed else 1])


def _setup(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    _, ends, _, parts, ctx.form, ctx.shape, ctx.transposed = inputs
    ctx.save_for_backward(ends, *parts)


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    ends, *parts = ctx.saved_tensors
    options = ctx.form, ctx.shape, not ctx.transposed  # the bias is frozen, as the stack is
    grad_x = torch.ops.ftlib.frozen_grouped_linear(grad.contiguous(), ends, None, parts, *options)
    return grad_x, None, None, [None] * len(parts), None, None, None


_frozen_grouped.register_autograd(_backward, setup_context=_setup)
