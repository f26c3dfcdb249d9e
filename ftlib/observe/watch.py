"""A look at every step's loss and gradient norm: what is not a number, and what is far off."""

import math
import statistics
from collections.abc import Callable, MutableMapping
from typing import Any

from ftlib.errors import UserError
from ftlib.sections import Optim

IN_A_ROW = 3  # steps without a finite gradient before `rollback` goes back; ten times as many end a `skip`
WINDOW, LEAST = 50, 20  # losses that a spike is measured by, and how many there have to be
FAR = 10.0  # median absolute deviations above the median, and half as much again as the median


class Watch:
    """`watch(step, loss, grad_norm)` after each step; True when the run must go back to its newest checkpoint.

    Loss and norm are those of all processes, so all decide alike. What it remembers lives in `memory` (JSON-able, the
    run's counters), so that a resumed run decides as one that never stopped.
    """

    def __init__(self, cfg: Optim, memory: MutableMapping[str, Any], say: Callable[[str], None]) -> None:
        self.cfg, self.memory, self.say = cfg, memory, say

    def __call__(self, step: int, loss: float, grad_norm: float) -> bool:
        memory = self.memory
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._nonfinite(step, loss, grad_norm)
        memory["bad_in_a_row"] = 0
        losses = memory.setdefault("losses", [])
        far = len(losses) >= LEAST and self._far(loss, losses)
        if far:
            usual = statistics.median(losses)
            what = f"step {step}: the loss is {loss:.4g}; the last {len(losses)} had a median of {usual:.4g}"
            if self.cfg.spike == "raise":
                fix = "look at the rows of this step, lower optim.lr, or set optim.spike to warn or rollback"
                raise UserError(what, where="optim.spike", fix=fix)
            if self.cfg.spike == "rollback":
                losses.clear()  # so that going back happens once, not at each step until the loss is down again
                return self._back(what)
            if self.cfg.spike == "warn" and not memory.get("spiking"):
                self.say(what)
        memory["spiking"] = far
        losses.append(loss)
        del losses[:-WINDOW]
        return False

    def _far(self, loss: float, losses: list[float]) -> bool:
        usual = statistics.median(losses)
        spread = statistics.median(abs(value - usual) for value in losses)
        return loss > usual + FAR * spread and loss > usual + 0.5 * abs(usual)

    def _nonfinite(self, step: int, loss: float, grad_norm: float) -> bool:
        memory = self.memory
        memory["bad_in_a_row"] = memory.get("bad_in_a_row", 0) + 1
        memory["bad_steps"] = memory.get("bad_steps", 0) + 1
        applied = "taken in part, so go on from a checkpoint" if self.cfg.in_backward else "not applied"
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}; the step was {applied}"
        last = memory["bad_in_a_row"] >= (10 * IN_A_ROW if self.cfg.nonfinite == "skip" else IN_A_ROW)
        if self.cfg.nonfinite == "raise" or (self.cfg.nonfinite == "skip" and last):
            raise UserError(
                what + (f", nor were the {memory['bad_in_a_row'] - 1} before it" if last else ""),
                where="optim.nonfinite",
                fix="lower optim.lr, lengthen schedule.warmup_steps, look at the rows of this step, "
                "or set optim.nonfinite to skip or rollback",
            )
        if self.cfg.nonfinite == "rollback" and last:
            memory["bad_in_a_row"] = 0
            return self._back(what)
        self.say(what)
        return False

    def _back(self, what: str) -> bool:
        self.memory["rollbacks"] = self.memory.get("rollbacks", 0) + 1
        if self.memory["rollbacks"] > IN_A_ROW:
            raise UserError(f"{what}; the run has already gone back {IN_A_ROW} times", fix="lower optim.lr")
        self.say(f"{what}: going back to a checkpoint, on with the data that follow")
        return True
