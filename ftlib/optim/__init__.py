"""Optimizers: `build` makes one, `set_rate` and `step` are what a training loop calls."""

from ftlib.optim.choose import build
from ftlib.optim.stepping import set_rate, step

__all__ = ["build", "set_rate", "step"]
