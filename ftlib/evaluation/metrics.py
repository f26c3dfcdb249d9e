"""What the numbers of a held-out evaluation are called, known before there is one: `eval.metric` names one of them."""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ftlib.errors import UserError, did_you_mean
from ftlib.sections import Reward


def names(cfg: Any) -> list[str]:
    """Those of the library's evaluations, by the sections of a recipe's config. Of several held-out sets each number is
    there by the set's name too; where only its files tell that, `*` stands for it."""
    compared = hasattr(cfg, "dpo") or isinstance(getattr(cfg, "reward", None), Reward)
    found = ["eval_loss", "eval_accuracy", "eval_margin"] if compared else ["eval_loss"]
    streamed = getattr(cfg, "stream", None) is not None and cfg.data.eval  # which holds rows of each source out
    sets = cfg.data.eval if isinstance(cfg.data.eval, tuple) else cfg.data.sources if streamed else ()
    several = sets if len(sets) > 1 else ()
    found += dict.fromkeys(f"{name}_{source.name or '*'}" for name in found for source in several)
    return found + ["exact_match"] * bool(getattr(cfg.eval, "exact_match", 0))


def check(cfg: Any, known: Sequence[str] | None) -> None:
    """UserError where no evaluation of this recipe, which give the numbers `known` (None: `names`), has `eval.metric`;
    a warning where it picks nothing."""
    if not (hasattr(cfg, "eval") and hasattr(cfg, "checkpoint")):
        return
    metric, known = cfg.eval.metric, names(cfg) if known is None else known
    if not any(fnmatchcase(metric, name) for name in known):
        off = metric == "exact_match" and hasattr(cfg.eval, "exact_match")
        more = "; exact_match is counted where eval.exact_match is above 0" if off else ""
        what = f"an evaluation here has no {metric!r}{did_you_mean(metric, known)}"
        raise UserError(what, where="eval.metric", fix=f"one of {', '.join(known)}{more}")
    if metric != type(cfg.eval)().metric and not (cfg.checkpoint.keep_best or cfg.eval.patience):
        what = f"eval.metric={metric} picks what checkpoint.keep_best keeps and when eval.patience ends a run"
        warnings.warn(f"{what}; neither is set, so it only names the best evaluation in report.html", stacklevel=2)
