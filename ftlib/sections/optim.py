"""The optimizer and its learning-rate schedule."""

import re
from dataclasses import dataclass
from typing import Literal

from ftlib.sections.steps import Steps, check_steps, in_steps

HOST = ("adamw", "lion", "ademamix")  # optimizers whose state may wait in host memory
# Settings of some optimizers only: their values when not set. Setting one for another optimizer is a mistake.
SETTINGS: dict[str, dict[str, float]] = {
    "muon": {"momentum": 0.95},
    "dion": {"momentum": 0.95, "rank_fraction": 0.25},
    "ademamix": {"alpha": 8.0, "beta3": 0.9999, "slow_warmup": 0},
}
LIMITS = {"momentum": "in [0, 1)", "beta3": "in [0, 1)", "rank_fraction": "in [0, 1]"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that differ from the rest; of several groups that match, the first counts."""

    match: str  # regular expression found anywhere in a parameter's name: `embed_tokens`, `layers\.[0-3]\.`
    lr_scale: float = 1.0  # their learning rate, as a multiple of optim.lr
    weight_decay: float | None = None  # their decay; null: as for the others

    def __post_init__(self) -> None:
        if self.lr_scale <= 0:
            raise ValueError("lr_scale: must be above 0; train.freeze keeps parameters as they are")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {self.match!r} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and what goes with it. Muon and Dion treat matrices; embeddings, head and vectors get AdamW."""

    # the update rule: ftlib/optim/README.md has a line on each
    name: Literal["adamw", "muon", "dion", "lion", "adafactor", "ademamix", "schedule_free"] = "adamw"
    lr: float = 2e-5  # peak learning rate; adafactor: of a parameter's own size, 1e-2 is usual
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment; schedule_free: the first mixes
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; not applied to biases, norms and other vectors
    groups: tuple[Group, ...] = ()  # parameters with a learning rate or a decay of their own
    mup_width: int | None = None  # the width lr was tuned at: matrices of inputs n times as wide learn n times slower
    momentum: float | None = None  # muon, dion: 0.95
    rank_fraction: float | None = None  # dion: rank of an update, as a share of the shorter side, 0.25
    alpha: float | None = None  # ademamix: weight of the slow momentum, 8
    beta3: float | None = None  # ademamix: decay of the slow momentum, 0.9999
    slow_warmup: int | None = None  # ademamix: steps over which alpha and beta3 rise to their values, 0
    states: Literal["fp32", "bf16", "int8", "fp8", "int4"] | None = None  # adamw: what moments are kept in; null: dtype
    rounding: Literal["nearest", "stochastic"] = "nearest"  # adamw: of weights in bf16; stochastic is right on average
    in_backward: bool = False  # move each parameter as soon as it has its gradient, and free that; no clipping
    offload: bool = False  # adamw, lion, ademamix: state waits in pinned host memory, a parameter's at a time is here
    max_grad_norm: float | None = 1.0  # clip the global gradient norm to this; null: no clipping
    nonfinite: Literal["raise", "skip", "rollback"] = "raise"  # NaN gradients, never applied: stop, go on, go back
    spike: Literal["ignore", "warn", "raise", "rollback"] = "warn"  # a loss far above the last 50

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr: must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas: both must lie in [0, 1)")
        if self.eps < 0 or self.weight_decay < 0:
            raise ValueError("eps and weight_decay: must not be negative")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError("max_grad_norm: must be above 0, or null for no clipping")
        if self.mup_width is not None and self.mup_width < 1:
            raise ValueError("mup_width: must be at least 1")
        for name in ("momentum", "rank_fraction", "alpha", "beta3", "slow_warmup"):
            value, own = getattr(self, name), SETTINGS.get(self.name, {})
            if value is None:
                continue
            if name not in own:
                users = ", ".join(key for key, settings in SETTINGS.items() if name in settings)
                raise ValueError(f"{name}: is for {users}; {self.name} has none")
            if value < 0 or (name in ("momentum", "beta3") and value >= 1) or (name == "rank_fraction" and value > 1):
                raise ValueError(f"{name}: {value} is not {LIMITS.get(name, 'at least 0')}; {own[name]:g} is usual")

        if self.name != "adamw" and (self.states is not None or self.rounding != "nearest"):
            raise ValueError(f"states, rounding: are for adamw; {self.name} has none")

        if self.offload and self.name not in HOST:
            raise ValueError(f"offload: is for {', '.join(HOST)}, which move a parameter by its own state alone")

    @property
    def slots(self) -> int:
        """Tensors of a matrix's size that the optimizer keeps for it, at the least."""
        return {"ademamix": 3, "adamw": 2, "schedule_free": 2, "adafactor": 0}.get(self.name, 1)

    def state_bytes(self, itemsize: int) -> float:
        """Bytes that the optimizer keeps, at the least, for a number of a matrix that has `itemsize` bytes itself."""
        sizes = {None: itemsize, "fp32": 4, "bf16": 2, "int8": 1, "fp8": 1, "int4": 0.5}
        wide = max(0, 4 - itemsize)  # what bfloat16 would lose is kept in float32
        more = {"schedule_free": 2 * wide + 4 * bool(wide), "ademamix": wide}.get(self.name, 0)
        return self.slots * sizes[self.states] + more

    def setting(self, name: str) -> float:
        """A setting of the named optimizer: what is set, else its usual value."""
        value = getattr(self, name)
        return SETTINGS[self.name][name] if value is None else value


WARMUP = 20  # steps, if nobody asks for others


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then the named decay to `min_ratio` of the peak at the last step."""

    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"  # wsd: constant, at the end linear
    warmup_steps: Steps = WARMUP  # or a share of the run (0.03); left at 20, at most a tenth of the run
    decay_steps: Steps | None = None  # wsd: steps of the decay at the end, or a share of the run's, 0.1
    min_ratio: float = 0.0  # learning rate at the last step, as a share of the peak; inverse_sqrt: the lowest

    def __post_init__(self) -> None:
        check_steps("warmup_steps", self.warmup_steps)
        check_steps("decay_steps", self.decay)
        if self.name != "wsd" and self.decay_steps is not None:
            raise ValueError(f"decay_steps: is for wsd; {self.name} has none")
        if not self.decay:
            raise ValueError("decay_steps: 0 is no decay; name=constant is the schedule without one")
        if self.name == "wsd" and max(self.warmup_steps, self.decay) < 1 < self.warmup_steps + self.decay:
            raise ValueError("decay_steps: with warmup_steps more than the whole run")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError("min_ratio: must lie between 0 and 1")

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up of a run of `steps`. What nobody asked for, or what would leave no other step, shortens
        itself to a tenth of the run, so that a run of few steps trains at its peak too."""
        asked = in_steps(self.warmup_steps, steps)
        unasked = self.warmup_steps == WARMUP or asked >= steps
        return min(asked, steps // 10) if unasked and not isinstance(self.warmup_steps, float) else asked

    @property
    def decay(self) -> Steps:
        """Steps of wsd's decay: what is set, else its usual share."""
        return 0.1 if self.decay_steps is None else self.decay_steps
