"""The optimizer that a config names."""

import torch
from torch import nn

from ftlib.optim.adafactor import Adafactor
from ftlib.optim.adamw import AdamW
from ftlib.optim.dion import Dion
from ftlib.optim.elementwise import AdEMAMix, Lion
from ftlib.optim.groups import parameter_groups
from ftlib.optim.host import HostState
from ftlib.optim.in_backward import InBackward
from ftlib.optim.muon import Muon
from ftlib.optim.schedule_free import ScheduleFreeAdamW
from ftlib.sections import Optim


def build(model: nn.Module, cfg: Optim) -> torch.optim.Optimizer:
    """The optimizer `cfg.name` over the trainable parameters, in the groups of `ftlib.optim.groups`.

    A module's `replicas` sum its gradients over processes (ftlib.parallel.replicas). With `cfg.in_backward` parameters
    move in backward from now on, at the rate that `set_rate` gave last; with `cfg.offload` state waits in host memory.
    """
    optimizer = choose(cfg, parameter_groups(model, cfg))
    optimizer.replicas = getattr(model, "replicas", None)
    if cfg.offload:
        optimizer.host = HostState(next(p.device for p in model.parameters() if p.requires_grad))
    if cfg.in_backward:
        optimizer.in_backward = InBackward(optimizer)
    return optimizer


def choose(cfg: Optim, groups: list[dict]) -> torch.optim.Optimizer:
    """`cfg.name` over groups of parameters. AdamW is torch's, fused on a GPU, unless something is asked of it that it
    has not."""
    common = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps}
    if cfg.name == "adamw" and (cfg.states or cfg.rounding == "stochastic" or cfg.in_backward or cfg.offload):
        return AdamW(groups, **common, states=cfg.states, stochastic=cfg.rounding == "stochastic")
    if cfg.name == "adamw":
        fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, **common, fused=fused)
    if cfg.name == "muon":
        return Muon(groups, **common, momentum=cfg.setting("momentum"))
    if cfg.name == "dion":
        more = {name: cfg.setting(name) for name in ("momentum", "rank_fraction")}
        return Dion(groups, **common, **more)
    if cfg.name == "ademamix":
        more = {name: cfg.setting(name) for name in ("alpha", "beta3", "slow_warmup")}
        return AdEMAMix(groups, **common, **more)
    return {"lion": Lion, "adafactor": Adafactor, "schedule_free": ScheduleFreeAdamW}[cfg.name](groups, **common)
