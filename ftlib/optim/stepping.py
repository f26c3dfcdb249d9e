"""One step of an optimizer: its rate, then the sum over replicas, clipping, the move."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftlib.optim.base import Update
from ftlib.optim.pieces import local


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every group `lr` times its `lr_scale`, before backward, which may already move parameters; returns `lr`.

    An optimizer that judged its last step on the device is asked now what came of it, as the device has nothing to do:
    behind backward the host would wait for that.
    """
    if isinstance(optimizer, Update):
        optimizer.settle()
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def step(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor:
    """Sum over replicas, clip, step, clear gradients; returns the global gradient norm before clipping, float32 scalar.

    A norm that is not finite leaves parameters and optimizer state as they were (`ftlib.observe.watch` decides what
    then). On a GPU the optimizer's kernel looks at it, so that nobody waits. Where backward has moved the parameters
    already (`optim.in_backward`) only the norm is left to add up.
    """
    if (in_backward := getattr(optimizer, "in_backward", None)) is not None:
        return in_backward.norm()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if getattr(optimizer, "replicas", None) is not None:
        optimizer.replicas.sum(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = global_norm(grads)
    if optimizer.defaults.get("fused") and not any(isinstance(p, DTensor) for p in parameters):
        optimizer.grad_scale = None if max_grad_norm is None else 1 / _factor(norm, max_grad_norm)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif getattr(optimizer, "gated", False):
        scale = torch.ones_like(norm) if max_grad_norm is None else _factor(norm, max_grad_norm)
        optimizer.gate = torch.stack((scale, norm.isfinite().to(norm)))
        optimizer.step()
    elif norm.isfinite():
        if max_grad_norm is not None:
            torch._foreach_mul_([local(grad) for grad in grads], _factor(norm, max_grad_norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients, in float32 at least: in bfloat16 it would depend on how they are sharded."""
    wide = reduce(torch.promote_types, {grad.dtype for grad in grads}, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=wide)))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _factor(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of this norm to `max_norm`, 1 where it is smaller."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
