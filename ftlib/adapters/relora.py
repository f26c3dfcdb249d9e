"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): merge the adapter into the base every so often and begin a new one, so
that what all of them change has a rank that none of them has.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftlib.adapters import initial, lora, merge
from ftlib.errors import UserError
from ftlib.models import load
from ftlib.models.shards import local, unsharded
from ftlib.sections import Relora


@dataclass
class Restarts:
    """What `at` goes by, kept on the model. `merged`: whether the base has become another than the one in its files."""

    section: Relora
    seed: int
    merged: bool = False


def attach(model: nn.Module, cfg: Any) -> None:
    """Let `at` know what a recipe's config asks for, on a model with its adapters; UserError for what does not go with
    it. A config without a `relora` section asks for nothing."""
    section: Relora | None = getattr(cfg, "relora", None)
    if section is None or not section.every:
        return
    _check(model, cfg)
    model.relora = Restarts(section, cfg.seed)


@torch.no_grad()
def at(step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Before step k * every + 1, k = 1 …: W <- W + scale * B A (`merge.fold`), A is drawn again and B is 0; AdamW's
    moments for them are pruned (`prune`), and its step count goes on. So do modules and rows that train whole. A
    layer's k-th draw depends on seed, name and k alone.
    """
    restarts: Restarts | None = getattr(model, "relora", None)
    if restarts is None or step == 1 or (step - 1) % restarts.section.every:
        return
    merge.fold(model)
    if (host := getattr(optimizer, "host", None)) is not None:
        host.wait()
    times = (step - 1) // restarts.section.every
    for layer, linear, factors in lora.adapted(model):
        lora.begin(linear, factors, None, lora.dice(f"{restarts.seed}:{layer}:{times}"))
        for parameter in (factors.stored("lora_A"), factors.stored("lora_B")):
            if state := optimizer.state.get(parameter):
                prune(state["exp_avg"], state["exp_avg_sq"], restarts.section.keep)
    restarts.merged = True


@torch.no_grad()
def prune(first: Tensor, second: Tensor, keep: float) -> None:
    """Set to 0 all of a parameter's two moments that is not above the (1 - keep) quantile of the magnitudes of its
    whole tensor, as the authors' "magnitude pruning"; and a first moment whose second is gone. That would be divided by
    eps alone: the gradient of A is 0 in the step after a merge, as B is. Collective where they are sharded."""
    for moment in (first, second):
        sizes = unsharded(moment).abs().flatten().sort().values
        mine = local(moment)
        mine.masked_fill_(mine.abs() <= sizes[int((1 - keep) * (len(sizes) - 1))], 0.0)
    local(first).masked_fill_(local(second) == 0, 0.0)


def merged_into(model: nn.Module) -> list[nn.Parameter]:
    """The weights that adapters are, or will be, merged into; none without a `relora` section."""
    if getattr(model, "relora", None) is None:
        return []
    return [linear._parameters["weight"] for _, linear, _ in lora.adapted(model)]


def changed(model: nn.Module) -> list[nn.Parameter]:
    """Those of them that differ from the files: none before the first merge."""
    return merged_into(model) if getattr(model, "relora", None) is not None and model.relora.merged else []


def expect(model: nn.Module, saved: Container[str]) -> None:
    """Before a checkpoint with the tensors `saved` is read: one from before the first merge has no base, so a base that
    has changed since is read from its files again."""
    restarts: Restarts | None = getattr(model, "relora", None)
    if restarts is None:
        return
    names = [f"{layer}.weight" for layer, _, _ in lora.adapted(model)]
    held = any(f"model.{name}" in saved for name in names)
    if restarts.merged and not held:
        load.load_weights(model, load.open_weights(model, model.source), only=names)
    restarts.merged = held


def fingerprint(cfg: Any) -> dict[str, Any]:
    """What must be equal for a run to be continued; the learning rate may change."""
    section: Relora | None = getattr(cfg, "relora", None)
    return {"relora.every": section.every, "relora.keep": section.keep} if section and section.every else {}


def _check(model: nn.Module, cfg: Any) -> None:
    every, optim, steps = cfg.relora.every, cfg.optim, getattr(cfg, "steps", None)
    adapted = list(lora.adapted(model))
    started = {f.init for _, _, f in adapted} & {*initial.FROM_WEIGHT, "loftq"}
    problems = (
        (bool(cfg.model.quantize or cfg.model.fp8), "model.quantize, model.fp8",
         "a base kept in few bits would be rounded anew at every merge"),
        (optim.name != "adamw" or optim.states in ("int8", "fp8", "int4"), "optim.name, optim.states",
         "what is pruned are AdamW's moments, in 16 bits at least"),
        (any(f.magnitude is not None for _, _, f in adapted), "lora.dora", "the length of a row is no low-rank change"),
        (bool(started), "lora.init", f"{', '.join(started)} begins inside W, every time anew"),
        (steps is not None and every >= steps, "steps", f"nothing is merged in {steps} steps"),
    )  # fmt: skip
    found = [(where, f"{where}: {why}") for wrong, where, why in problems if wrong]
    if found:
        raise UserError(
            "; ".join(text for _, text in found),
            where=", ".join(["relora.every", *(where for where, _ in found)]),
            fix="leave these out, or relora.every=0",
        )
