"""Numbers of steps that may be given as a share of the run's, whose length epochs settle only when rows are counted."""

from typing import Any

Steps = int | float  # a number of steps, or between 0 and 1 a share of all the run's

SHARED = {"schedule": ("warmup_steps", "decay_steps"), "eval": ("every",), "checkpoint": ("every",)}


def check_steps(name: str, value: Steps) -> None:
    """ValueError of a section whose key `name` is neither a number nor a share; 0 is allowed."""
    if value != 0 and not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        what = "a whole number of steps (20, or 0) nor a share of the run's, above 0 and below 1 (0.1)"
        raise ValueError(f"{name}: {value} is neither {what}")


def in_steps(value: Steps, steps: int) -> int:
    """What `value` is in a run of `steps`: a share is rounded, and at least one step. The one place that says so."""
    return max(1, round(value * steps)) if isinstance(value, float) and value else int(value)


def shares(cfg: Any, steps: int) -> list[str]:
    """What the shares in a config, and a warm-up nobody asked for, became in a run of `steps`, for the user."""
    said = []
    for section, names in SHARED.items():
        for name in names:
            value = getattr(getattr(cfg, section, None), name, None)
            if isinstance(value, float) and value:
                said.append(f"{section}.{name} {value:g} is {in_steps(value, steps):,}")
            elif name == "warmup_steps" and value and (became := cfg.schedule.warmup(steps)) != value:
                said.append(f"{section}.{name} {value} is {became:,}")
    return [f"of {steps:,} steps: {', '.join(said)}"] if said else []
