"""Optimizers that look at each number by itself, so that they are the same on any mesh: Lion and AdEMAMix."""

import math

import torch

from ftlib.optim.base import Group, Update


class Lion(Update):
    """Lion (Chen et al. 2023, arXiv 2302.06675, program 1): the sign of an interpolated momentum; one slot of state.

    Its steps are longer than AdamW's: a learning rate 3 to 10 times smaller and a decay as much larger are usual.
    """

    def update(self, group: Group) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in self.stepped(group):
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            direction = state["exp_avg"].lerp(p.grad, 1 - beta1).sign_()
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(direction, alpha=-lr)
            state["exp_avg"].lerp_(p.grad, 1 - beta2)


class AdEMAMix(Update):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137, algorithm 1): AdamW with a second, slow momentum beside it.

    The slow momentum is kept in float32 at least: bfloat16 loses what a step adds to it, a ten-thousandth by default.
    `alpha` and the slow decay `beta3` rise to their values over `slow_warmup` steps (0: at once), the first linearly,
    the second so that its half-life does.
    """

    def update(self, group: Group) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in self.stepped(group):
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg_slow"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            state["step"] += 1
            step = state["step"]
            alpha, beta3 = slow_terms(step, group["slow_warmup"], group["alpha"], group["beta3"], beta1)
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            slow = state["exp_avg_slow"]
            slow.lerp_(p.grad.to(slow.dtype), 1 - beta3)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            spread = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            direction = state["exp_avg"] / (1 - beta1**step) + alpha * slow
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(direction / spread, alpha=-lr)


def slow_terms(step: int, warmup: int, alpha: float, beta3: float, beta1: float) -> tuple[float, float]:
    """AdEMAMix's alpha and beta3 at a step, from 1 (section 3 of the paper: linear, and linear in the half-life)."""
    done = 1.0 if warmup == 0 else min(1.0, step / warmup)
    start, end = math.log(beta1), math.log(beta3)
    return alpha * done, min(beta3, math.exp(start * end / ((1 - done) * end + done * start)))
