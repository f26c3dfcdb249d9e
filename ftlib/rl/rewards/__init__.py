"""Reward functions: TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list of float or None`.

`prompts` and `completions` are texts where the row's prompt is text, and lists of messages where it is one or where
something answers the model; `columns` are lists of the rows' other columns. None: this completion cannot be scored. The
library's own work on one completion at a time (`each`) and read both.

This package imports neither torch nor anything that does: it is loaded by the processes that run rewards.
"""

from collections.abc import Callable

from ftlib.rl.rewards import code, form, maths, text

BUILTIN: dict[str, Callable] = {
    "gsm8k": maths.gsm8k,
    "maths": maths.maths,
    "exact": text.exact,
    "contains": text.contains,
    "regex": text.regex,
    "format": form.tags,
    "length": form.length,
    "soft_overlong": form.soft_overlong,
    "repetition": form.repetition,
    "json_schema": form.json_schema,
    "code_tests": code.code_tests,
}

__all__ = ["BUILTIN"]
