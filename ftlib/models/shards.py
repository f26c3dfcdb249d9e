"""Which part of a whole tensor this process holds."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_index(tensor: Tensor) -> tuple[slice, ...]:
    """The part of the whole tensor that this process holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def local(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, of which this process may hold only a part."""
    local(parameter).copy_(whole[local_index(parameter)])


def unsharded(tensor: Tensor) -> Tensor:
    """All of a tensor, where it is. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, contiguous, on the CPU. Collective where it is sharded."""
    return unsharded(tensor.detach()).cpu().contiguous()
