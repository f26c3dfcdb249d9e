"""Full fine-tuning in which most layers sleep: gradients and optimizer state of a few at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ftlib.errors import UserError
from ftlib.sections.train import Lisa


def attach(model: nn.Module, cfg: Any) -> None:
    """Let `at` know what a recipe's config asks for; a config without a `lisa` section asks for nothing."""
    section: Lisa | None = getattr(cfg, "lisa", None)
    if section is None or not section.layers:
        return
    if section.layers >= len(model.model.layers):
        what = f"{section.layers} of {len(model.model.layers)} layers are all of them"
        raise UserError(what, where="lisa.layers", fix="ask for fewer, or 0 for plain training")
    model.lisa = (section, cfg.seed)


def awake(cfg: Lisa, seed: int, step: int, layers: int) -> set[int]:
    """The layers that train in step 1 …: `cfg.layers` of `layers`, each set as likely as any other, drawn anew every
    `cfg.every` steps (LISA, Pan et al. 2024, arXiv 2403.17919, algorithm 1). A function of seed and step alone."""
    period = (step - 1) // cfg.every
    generator = torch.Generator().manual_seed((seed * 1_000_003 + period) & ((1 << 62) - 1))
    return set(torch.randperm(layers, generator=generator)[: cfg.layers].tolist())


def asleep(model: nn.Module, step: int) -> list[nn.Parameter]:
    """Parameters that do not train in a step, by `awake`; embedding, head and last norm always do."""
    if getattr(model, "lisa", None) is None:
        return []
    chosen = awake(*model.lisa, step, len(model.model.layers))
    return [p for i, block in enumerate(model.model.layers) if i not in chosen for p in block.parameters()]


def at(step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Before the step: wake its layers and put the others to sleep, whose optimizer state is given up."""
    if getattr(model, "lisa", None) is None:
        return
    wake(model)
    for parameter in asleep(model, step):
        parameter.requires_grad_(False)
        optimizer.state.pop(parameter, None)


def wake(model: nn.Module) -> None:
    """Let every layer train, as before the first step and before a checkpoint is read."""
    if getattr(model, "lisa", None) is not None:
        model.requires_grad_(True)


def check(cfg: Any, shape: Sequence[int]) -> None:
    """UserError for what layers that sleep do not go with, on a mesh (dp_replicate, dp_shard, cp, tp)."""
    section = getattr(cfg, "lisa", None)
    if section is None or not section.layers:
        return
    train = cfg.train
    problems = {
        "parallel": (max(shape[1:]) > 1, "shards do not follow layers that wake; set dp_shard, cp and tp to 1"),
        "optim.name": (cfg.optim.name == "schedule_free", "its average is state that sleepers need; set adamw"),
        "train": (bool(train.only or train.freeze), "layers are chosen already; leave it out"),
        "qat": (cfg.qat is not None, "it changes what a layer's weights are; set it to null"),
    }
    found = [f"{where}: {why}" for where, (wrong, why) in problems.items() if wrong]
    if found:
        where = ", ".join(["lisa.layers", *(where for where, (wrong, _) in problems.items() if wrong)])
        raise UserError("; ".join(found), where=where, fix="as said, or lisa.layers=0")
