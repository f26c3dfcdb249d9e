"""Collectives that autograd and torch.compile understand. Each one's backward is another one of them.

The operators below `torch.ops._c10d_functional` are what torch's own functional collectives call, under the same names
in every release that we support; nothing outside this file knows them.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

_ops = torch.ops._c10d_functional


def _wait(x: Tensor) -> Tensor:
    return _ops.wait_tensor(x)


def _all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    out = _wait(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    return out if dim == 0 else torch.cat(out.chunk(group.size()), dim)


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    x = x if dim == 0 else torch.cat(x.chunk(group.size(), dim))
    return _wait(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        return _all_gather(grad, ctx.dim, ctx.group), None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return _wait(_ops.all_reduce(grad.contiguous(), "sum", ctx.group.group_name)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN001
        return _wait(_ops.all_reduce(x.contiguous(), "sum", group.group_name))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return grad, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.group, even = group, [x.shape[0] // group.size()] * group.size()
        return _wait(_ops.all_to_all_single(x.contiguous(), even, even, group.group_name))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return _Exchange.apply(grad, ctx.group), None


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Every process's `x` side by side along `dim`. Gradients of the result are parts of a sum over the processes."""
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This process's slice along `dim` of the sum of every process's `x`."""
    return _Scatter.apply(x, dim, group)


def shared(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, equal on every process and used by each on its own part of the work: gradients are summed."""
    return _Shared.apply(x, group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every process's `x`, which all of them go on with alike: the gradient passes unchanged."""
    return _Sum.apply(x, group)


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Slice i of dimension 0 goes to process i; what arrives is ordered by sender."""
    return _Exchange.apply(x, group)


def pass_on(x: Tensor, group: str) -> Callable[[], Tensor]:
    """Begin to send `x` to the next process of the group with this name, and to receive the last one's, which a call of
    the result waits for. Every process calls this, in the same order; unknown to autograd."""
    found = _resolve_process_group(group)
    rank, size, arriving = found.rank(), found.size(), torch.empty_like(x)
    after, before = (dist.get_global_rank(found, (rank + step) % size) for step in (1, -1))
    both = [dist.P2POp(dist.isend, x, after, found), dist.P2POp(dist.irecv, arriving, before, found)]
    works = dist.batch_isend_irecv(both)

    def wait() -> Tensor:
        for work in works:
            work.wait()
        both.clear()  # until here what is sent must stay
        return arriving

    return wait
