"""Parameters that move in backward, each as soon as its gradient is there, so that gradients never exist at once."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ftlib.errors import UserError
from ftlib.optim.base import Group, Update
from ftlib.optim.pieces import Piece, local_gradient, piece

ALONE = ("adamw", "lion", "ademamix", "schedule_free")  # optimizers that move each number by itself


class InBackward:
    """Hooks on every parameter of `optimizer` that move it and free its gradient, as LOMO does for SGD (Lv et al. 2023,
    arXiv 2306.09782). The move is the optimizer's own: the same bits as after backward, where nothing is clipped."""

    def __init__(self, optimizer: Update) -> None:
        self._squares: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
        self._host = optimizer.host
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._move, optimizer, group))

    @torch.no_grad()
    def _move(self, optimizer: Update, group: Group, p: Tensor) -> None:
        grad = local_gradient(p)
        wide = torch.promote_types(grad.dtype, torch.float32)
        self._squares.setdefault(piece(p).groups, []).append(torch.linalg.vector_norm(grad, dtype=wide).square())
        optimizer.move({**group, "params": [p]})
        p.grad = None

    def norm(self) -> Tensor:
        """After backward: the 2-norm of all gradients since the last call. Collective where parameters are sharded."""
        if self._host is not None:
            self._host.end()
        sums = [Piece((), groups).add_up(torch.stack(found).sum()) for groups, found in self._squares.items()]
        self._squares.clear()
        return torch.stack(sums).sum().sqrt()


def check(cfg: Any, per_forward: int, shape: tuple[int, int, int, int]) -> None:
    """UserError for everything in a recipe's config that needs all gradients of a step at once, or a sum of several.

    `per_forward` rows go through all processes at a time, on a mesh (dp_replicate, dp_shard, cp, tp).
    """
    if not (hasattr(cfg, "optim") and cfg.optim.in_backward):
        return
    optim, (replicate, shard, cp, tp) = cfg.optim, shape
    rows, statistics = getattr(cfg.batch, "rows", per_forward), getattr(getattr(cfg, "log", None), "statistics", 0)
    several = hasattr(cfg, "rollout")  # its updates have no rate of their own, and its gradients are looked at first
    problems = (
        (optim.name not in ALONE, "optim.name", f"{optim.name} looks at whole matrices", f"set {' or '.join(ALONE)}"),
        (optim.max_grad_norm is not None, "optim.max_grad_norm", "clipping needs the norm of all gradients",
         "set it to null; the norm is still in the log"),
        (optim.nonfinite != "raise", "optim.nonfinite", "a step that is left out has partly been taken",
         "set it to raise"),
        (rows != per_forward, "batch.rows", f"gradients of {rows} rows are sums over forwards of {per_forward}",
         f"set batch.micro_rows={cfg.batch.micro_rows * rows // per_forward}, or batch.rows={per_forward}"),
        (getattr(cfg, "deterministic", False) == "elastic", "deterministic", "elastic adds gradients up after backward",
         "set it to true or false"),
        (replicate > 1 and shard * cp == 1, "parallel.dp_replicate", "gradients of whole copies are summed afterwards",
         f"set parallel.dp_replicate=1 and parallel.dp_shard={replicate}"),
        (tp > 1, "parallel.tp", "matrices are shared by several processes", "set parallel.tp=1; dp_shard works"),
        (statistics > 0, "log.statistics", "they are taken of gradients that are gone by then", "set it to 0"),
        (several, "optim.in_backward", "this recipe learns in several updates of what it has drawn", "set it to false"),
    )  # fmt: skip
    found = [(where, f"{where}: {why}: {fix}") for wrong, where, why, fix in problems if wrong]
    if found:
        raise UserError(
            "a parameter that moves in backward leaves no gradient behind:\n    "
            + "\n    ".join(text for _, text in found),
            where=", ".join(dict.fromkeys(["optim.in_backward", *(where for where, _ in found)])),
            fix="as said, or optim.in_backward=false",
        )
