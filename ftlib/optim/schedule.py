"""Learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from ftlib.sections import Relora, Schedule


def learning_rate(cfg: Schedule, peak: float, step: int, steps: int, restarts: Relora = Relora()) -> float:
    """Rate of step 1 … `steps`: linear warm-up to `peak`, then the named decay to `min_ratio * peak` at the last step.

    Warm-up shortens itself to a tenth of the run, so that a run of few steps trains at its peak too. After each of its
    merges `restarts` brings the rate back from 0 linearly (arXiv 2307.05695, "jagged cosine").
    """
    if restarts.every and step > restarts.every:
        since = (step - 1) % restarts.every + 1
        if since <= restarts.warmup_steps:
            return learning_rate(cfg, peak, step, steps) * since / restarts.warmup_steps
    warmup = min(cfg.warmup_steps, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    if cfg.name == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    shape = (1 + math.cos(math.pi * done)) / 2 if cfg.name == "cosine" else 1 - done
    return peak * (cfg.min_ratio + (1 - cfg.min_ratio) * shape)
