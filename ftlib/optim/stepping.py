"""One step of an optimizer: its rate, then the sum over replicas, clipping, the move."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every group `lr` times its `lr_scale`, before backward, which may already move parameters; returns `lr`."""
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
    norm = clip(parameters, max_grad_norm)
    if optimizer.defaults.get("fused") and not any(isinstance(p, DTensor) for p in parameters):
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their global 2-norm is at most `max_norm` (None: only measure)."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
