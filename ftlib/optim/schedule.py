"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math
import warnings

from ftlib.sections import Relora, Schedule
from ftlib.sections.optim import WARMUP
from ftlib.sections.steps import in_steps

TIMESCALE = 10_000  # of inverse_sqrt without warm-up, as in transformers


def learning_rate(cfg: Schedule, peak: float, step: int, steps: int, restarts: Relora = Relora()) -> float:
    """Rate of step t = 1 … `steps` (T): peak * t / w in a warm-up of w steps, then by name, with m = `min_ratio`:

    - constant: peak
    - cosine, linear: peak * (m + (1 - m) f(d)), d = (t - w) / (T - w), f = (1 + cos(pi d)) / 2 or 1 - d
    - wsd: peak, and over the last `decay_steps` as linear (warm-up, stable, decay: MiniCPM, arXiv 2404.06395)
      (all three: a way down of one step, which would train at 0, is none)
    - inverse_sqrt: peak * max(m, sqrt(w / t)), without warm-up sqrt(s / (t + s)), s = 10,000; it knows no last step

    After each of its merges `restarts` brings the rate back from 0 linearly (arXiv 2307.05695, "jagged cosine").
    """
    if restarts.every and step > restarts.every:
        since = (step - 1) % restarts.every + 1
        if since <= restarts.warmup_steps:
            return learning_rate(cfg, peak, step, steps) * since / restarts.warmup_steps
    warmup = cfg.warmup(steps)
    if step <= warmup:
        return peak * step / warmup
    if cfg.name == "constant":
        return peak
    if cfg.name == "inverse_sqrt":
        scale = warmup or TIMESCALE
        return peak * max(cfg.min_ratio, math.sqrt(scale / (step - warmup + scale)))
    start = max(warmup, steps - in_steps(cfg.decay, steps)) if cfg.name == "wsd" else warmup
    done = max(0, step - start) / (steps - start) if steps - start > 1 else 0.0
    shape = (1 + math.cos(math.pi * done)) / 2 if cfg.name == "cosine" else 1 - done
    return peak * (cfg.min_ratio + (1 - cfg.min_ratio) * shape)


def check(cfg: Schedule, steps: int) -> None:
    """Warn of what is asked for and does not fit into a run of `steps`."""
    asked, warmup = cfg.warmup_steps, cfg.warmup(steps)
    if asked >= steps and asked != WARMUP:  # else nobody asked for it
        what = f"schedule.warmup_steps is {asked} and steps {steps}, which leaves none for anything else"
        warnings.warn(f"{what}: the warm-up is shortened to {warmup} steps", stacklevel=3)
    if cfg.name == "wsd" and (decay := in_steps(cfg.decay, steps)) > steps - warmup:
        what = f"schedule.decay_steps is {decay} and the warm-up leaves {steps - warmup} of {steps} steps"
        warnings.warn(f"{what}: the decay is shortened to them", stacklevel=3)
