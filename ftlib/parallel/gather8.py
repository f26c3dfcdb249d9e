"""Weights that are multiplied in 8 bits are gathered in 8 bits."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from ftlib.kernels.fp8_linear import E4M3, encode, power_of_two
from ftlib.quant.float8 import Float8Linear


def use(unit: FSDPModule) -> None:
    """Let a unit of FSDP2 gather the weights of Float8Linear layers with one scale as codes, others as they are."""
    if any(_narrow(module, "weight") for module in unit.modules()):
        unit.set_custom_all_gather(Gather8(unit))


def _narrow(module: nn.Module, name: str) -> bool:
    return isinstance(module, Float8Linear) and not module.rows and name == "weight"


class Gather8:
    """What FSDP2 calls to gather a unit's parameters, packed one after the other.

    A weight is coded with the scale of the whole, which the processes agree on first, and arrives as codes times scale.
    A power of two makes that exact in any dtype, and casting it again, as the layer does, gives the same numbers: the
    products are those of one process.
    """

    def __init__(self, unit: FSDPModule) -> None:
        packed = unit._get_fsdp_state()._fsdp_param_group.fsdp_params  # nothing public tells how a unit is packed
        self.sizes = [parameter.padded_sharded_param_size.numel() for parameter in packed]
        self.narrow = [_narrow(p._module_info.module, p._module_info.param_name) for p in packed]

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the whole unit."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False
    ) -> None:
        """Every process's `input_tensor` [n] into `output_tensor` [processes * n]."""
        parts = input_tensor.split(self.sizes)
        largest = torch.stack([fused(largest_of, part) for part, narrow in self._each(parts) if narrow])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        scales = iter(power_of_two(largest, E4M3))
        scales = [next(scales) if narrow else None for narrow in self.narrow]
        sizes = [part.numel() if narrow else part.nbytes for part, narrow in self._each(parts)]
        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=input_tensor.device)
        for target, part, scale in zip(sent.split(sizes), parts, scales, strict=True):
            if scale is None:
                target.copy_(part.view(torch.uint8))
            else:
                fused(put_codes, target, part, scale)
        received = sent.new_empty(group.size() * len(sent))
        dist.all_gather_into_tensor(received, sent, group=group)
        arrived = received.view(group.size(), -1).split(sizes, 1)
        targets = output_tensor.view(group.size(), -1).split(self.sizes, 1)
        for target, part, scale in zip(targets, arrived, scales, strict=True):
            if scale is None:
                target.copy_(part.contiguous().view(target.dtype))
            else:
                fused(put_whole, target, part, scale)

    def _each(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        """(part of the unit, whether it goes as codes)."""
        return zip(parts, self.narrow, strict=True)


def largest_of(part: Tensor) -> Tensor:
    """Its largest magnitude, float32; NaN where it has one."""
    return part.abs().amax().float()


def put_codes(target: Tensor, part: Tensor, scale: Tensor) -> None:
    """Codes of `part` into `target`, uint8 of as many elements."""
    target.copy_(encode(part, scale, E4M3).view(torch.uint8))


def put_whole(target: Tensor, codes: Tensor, scale: Tensor) -> None:
    """The numbers that `codes`, uint8, stand for into `target`."""
    target.copy_(codes.view(E4M3).to(target.dtype) * scale.to(target.dtype))


def fused(function: Callable[..., Tensor | None], *tensors: Tensor) -> Tensor | None:
    """`function(*tensors)`, on a GPU as one pass over memory: step by step it is seven, beside products that wait for
    the same memory."""
    return (_compiled(function) if tensors[0].is_cuda else function)(*tensors)


@cache
def _compiled(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    return torch.compile(function, dynamic=True, fullgraph=True)
