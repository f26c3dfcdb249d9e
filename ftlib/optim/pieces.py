"""The part of a parameter that this process holds, for updates that look at a whole matrix."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ftlib.models.shards import local_index


class Piece(NamedTuple):
    """`index`: where the local part of a tensor lies in the whole; `groups`: over whom the parts are spread."""

    index: tuple[slice, ...]
    groups: tuple[ProcessGroup, ...]

    def add_up(self, x: Tensor) -> Tensor:
        """`x`, each process's share of a sum, in place over all processes that hold a part."""
        for group in self.groups:
            dist.all_reduce(x, group=group)
        return x

    def whole(self, shape: tuple[int, ...], index: tuple[slice, ...], part: Tensor) -> Tensor:
        """A tensor of `shape` that is the sum of every process's `part`, each at its own `index`; equal on all."""
        x = torch.zeros(shape, dtype=part.dtype, device=part.device)
        x[index] = part
        return self.add_up(x)


def piece(tensor: Tensor) -> Piece:
    """Of a plain tensor all of it, of a sharded one this process's part."""
    if not isinstance(tensor, DTensor):
        return Piece(local_index(tensor), ())
    mesh = tensor.device_mesh
    groups = tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1  # rows cut by tp and again by FSDP2 are no plain Shard
    )
    return Piece(local_index(tensor), groups)


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or the part of it that this process holds (the same memory)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(p: Tensor) -> Tensor:
    """The part of a parameter's gradient that belongs to the local part of the parameter, summed if it was not yet."""
    if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
        return p.grad.redistribute(placements=p.placements).to_local()
    return local(p.grad)
