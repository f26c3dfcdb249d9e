"""The optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and what goes with it."""

    name: Literal["adamw"] = "adamw"
    lr: float = 2e-5  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; not applied to biases, norms and other vectors
    max_grad_norm: float | None = 1.0  # clip the global gradient norm to this; null: no clipping
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"  # NaN gradients, never applied: stop, go on, go back
    spike: Literal["ignore", "warn", "raise", "rollback"] = "warn"  # a loss far above the last 50

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr: must be above 0")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError("max_grad_norm: must be above 0, or null for no clipping")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then the named decay to `min_ratio` of the peak at the last step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 20  # shortens itself to a tenth of a run that is shorter than ten times this
    min_ratio: float = 0.0  # learning rate at the last step, as a share of the peak

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError("warmup_steps: must not be negative")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError("min_ratio: must lie between 0 and 1")
