"""AdamW over the trainable parameters, and one optimizer step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.sections import Optim


def build(model: nn.Module, cfg: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); vectors (norms, biases) are not decayed.

    A module may have `lr_scales`, parameter name -> multiple of the learning rate (LoRA+); such a group has a
    setting `lr_scale`, which `step` obeys.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    scales = lr_scales(model)
    groups = []
    for scale in sorted({1.0, *scales.values()}):
        same = [p for p in trainable if scales.get(p, 1.0) == scale]
        more = {} if scale == 1.0 else {"lr": cfg.lr * scale, "lr_scale": scale}
        groups.append({"params": [p for p in same if p.ndim >= 2], "weight_decay": cfg.weight_decay, **more})
        groups.append({"params": [p for p in same if p.ndim < 2], "weight_decay": 0.0, **more})
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type == "cuda" for p in trainable)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def lr_scales(model: nn.Module) -> dict[nn.Parameter, float]:
    """Parameters whose learning rate is a multiple of the optimizer's."""
    found = {}
    for module in model.modules():
        for name, scale in getattr(module, "lr_scales", {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None and scale != 1.0:
                found[parameter] = scale
    return found


def step(optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float | None) -> Tensor:
    """Clip, step, clear gradients; returns the global gradient norm before clipping, float32 scalar.

    A norm that is not finite leaves parameters and optimizer state as they were (`ftlib.observe.watch` decides what
    then). On a GPU the optimizer's kernel looks at it, so that nobody waits.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip(parameters, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
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
