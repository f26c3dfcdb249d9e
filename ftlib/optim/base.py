"""What our optimizers share: a loop over parameters that have a gradient, and AdamW beside another update."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ftlib.optim.host import HostState

Group = dict[str, Any]


class Update(Optimizer, ABC):
    """An optimizer whose step is `update(group)` for each group. State is plain tensors and numbers, so that a
    checkpoint holds it; it is made in a parameter's first step, whatever the gradient. With `host` it waits there."""

    host: HostState | None = None

    def __init__(self, groups: Iterable[Group], **defaults: Any) -> None:
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every group. Gradients may be overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.move(group)
        if self.host is not None:
            self.host.end()
        return loss

    def settle(self) -> None:
        """Before somebody reads the numbers of the state: bring them up to date."""

    def move(self, group: Group) -> None:
        """`update`, wherever state waits. After the last of a step, `host.end`."""
        if self.host is None:
            self.update(group)
            return
        for p in self.stepped(group):
            self.host.step(self, group, p)

    @abstractmethod
    def update(self, group: Group) -> None:
        """Move the parameters of a group."""

    def stepped(self, group: Group) -> list[Tensor]:
        """Parameters of a group that have a gradient."""
        return [p for p in group["params"] if p.grad is not None]

    def adamw(self, group: Group) -> None:
        """torch's AdamW for a group, fused on a GPU."""
        params = self.stepped(group)
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device if p.is_cuda else None)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if not params:
            return
        slots = [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]
        adamw(
            params, [p.grad for p in params], *slots, [], [self.state[p]["step"] for p in params],
            fused=all(p.is_cuda for p in params), amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


class MatrixUpdate(Update):
    """`update_matrices(group)` for groups with `matrices`, AdamW for the others: embeddings, head, norms, biases."""

    def update(self, group: Group) -> None:
        if group["matrices"]:
            self.update_matrices(group)
        else:
            self.adamw(group)

    @abstractmethod
    def update_matrices(self, group: Group) -> None:
        """Move the hidden matrices of a group."""
