"""Weights that are multiplied in 8 bits are gathered in 8 bits."""

from collections.abc import Sequence

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
        parts = list(zip(input_tensor.split(self.sizes), self.narrow, strict=True))
        largest = torch.stack([part.abs().amax().float() for part, _ in parts])  # those of other parts go unused
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        scales = power_of_two(largest, E4M3)
        codes = [
            encode(part, scale, E4M3) if narrow else part
            for (part, narrow), scale in zip(parts, scales, strict=True)
        ]
        sent = torch.cat([part.view(torch.uint8) for part in codes])
        received = torch.empty(group.size() * len(sent), dtype=torch.uint8, device=sent.device)
        dist.all_gather_into_tensor(received, sent, group=group)
        arrived = received.view(group.size(), -1).split([part.nbytes for part in codes], 1)
        targets = output_tensor.view(group.size(), -1).split(self.sizes, 1)
        for target, part, (_, narrow), scale in zip(targets, arrived, parts, scales, strict=True):
            whole = part.contiguous().view(E4M3 if narrow else target.dtype)
            target.copy_(whole.to(target.dtype) * scale.to(target.dtype) if narrow else whole)
