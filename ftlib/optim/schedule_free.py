"""Schedule-free AdamW: an average of the iterates in place of a learning-rate schedule."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ftlib.errors import UserError
from ftlib.optim.base import Group, Update
from ftlib.sections import Optim, Schedule


class ScheduleFreeAdamW(Update):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, section 4; decay at y).

    Three sequences: z takes the steps, x is the average of the z, weighted by the squared learning rate, and gradients
    are taken at y = (1 - beta1) z + beta1 x. Parameters are y while training; `average` makes them x, which is the
    model to evaluate and to keep. Warm-up is the schedule's; a decay is not needed.

    y and z are kept in float32 at least: y follows z by a share of 1 / t, of which bfloat16 would lose all, and x lies
    beyond y by what it lost. Narrower parameters are y, rounded.
    """

    def update(self, group: Group) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in self.stepped(group):
            state, wide = self.state[p], torch.promote_types(p.dtype, torch.float32)
            if not state:
                state |= {"step": 0, "peak": 0.0, "weight": 0.0, "z": p.detach().to(wide, copy=True)}
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
                if wide != p.dtype:
                    state["y"] = state["z"].clone()
            y, grad = state.get("y", p), p.grad.to(wide)
            state["step"] += 1
            state["peak"] = max(state["peak"], lr)
            state["weight"] += state["peak"] ** 2
            share = state["peak"] ** 2 / state["weight"] if state["weight"] else 1.0
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            spread = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            direction = (grad / spread).add_(y, alpha=group["weight_decay"])
            y.lerp_(state["z"], share)
            y.add_(direction, alpha=lr * (beta1 * (1 - share) - 1))
            state["z"].sub_(direction, alpha=lr)
            if y is not p:
                p.copy_(y)

    @torch.no_grad()
    def average(self) -> None:
        """Turn the parameters from y into x. Training cannot go on from there."""
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    z, y = self.state[p]["z"], self.state[p].get("y", p)
                    p.copy_(y.lerp(z, 1 - 1 / group["betas"][0]))


def check(optim: Optim, schedule: Schedule) -> None:
    """UserError for a decay under an optimizer that stands in its place."""
    if optim.name == "schedule_free" and schedule.name != "constant":
        raise UserError(
            f"schedule-free learning averages in place of a decay, and the schedule is {schedule.name}",
            where="schedule.name, optim.name",
            fix="set schedule.name=constant; its warm-up stays",
        )


@contextmanager
def averaged(optimizer: object) -> Iterator[None]:
    """Inside, the parameters are what is to be evaluated; after it, to the bit what they were."""
    if not isinstance(optimizer, ScheduleFreeAdamW):
        yield
        return
    kept = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.average()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def finish(optimizer: object) -> None:
    """After the last step: the parameters become the model to keep."""
    if isinstance(optimizer, ScheduleFreeAdamW):
        optimizer.average()
