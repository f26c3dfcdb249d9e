"""Algorithms by name: every setting a preset decides, what the config changes, and the formula that results."""

import dataclasses
from dataclasses import dataclass

from ftlib.losses.policy import Objective
from ftlib.rl.advantages import EPS
from ftlib.sections.rl import Algorithm, Rollout


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """An algorithm with nothing left open."""

    advantage: str = "group"
    aggregation: str = "token"
    objective: Objective = Objective()
    kl_coef: float = 0.0
    kl_in: str = "loss"
    overlong: str = "keep"
    overlong_margin: float = 0.2
    dynamic_sampling: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of a second policy are part of the formula."""
        return self.kl_coef > 0 or self.advantage == "teacher"

    @property
    def token_advantages(self) -> bool:
        """Whether tokens of one completion have different advantages."""
        return self.advantage == "teacher" or (self.kl_in == "reward" and self.kl_coef > 0)


PRESETS: dict[str, dict[str, object]] = {
    "grpo": {},
    "grpo_paper": {"aggregation": "seq", "clip_high": 0.2, "kl_coef": 0.04},
    "dr_grpo": {"advantage": "center", "aggregation": "const", "clip_high": 0.2},
    "dapo": {"dynamic_sampling": True, "overlong": "soft"},
    "gspo": {"ratio": "sequence", "aggregation": "seq", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo"},
    "rloo": {"advantage": "loo", "loss": "reinforce", "aggregation": "const"},
    "reinforce++": {"advantage": "whiten", "clip_high": 0.2, "kl_in": "reward"},
    "gdpo": {"advantage": "gdpo"},
    "distill": {"advantage": "teacher", "loss": "reinforce"},
}

ADVANTAGES = {
    "group": f"(r - mean of group) / (std of group + {EPS:g})",
    "center": "r - mean of group",
    "loo": "r - mean of the others of the group",
    "batch": f"(r - mean of group) / (std of step + {EPS:g})",
    "whiten": f"(r - mean of step) / (std of step + {EPS:g}), over tokens",
    "center_whiten": "r - mean of group, then whitened over the step",
    "maxrl": f"(r - mean of group) / (mean of group + {EPS:g})",
    "opo": "r - length-weighted mean of group",
    "gdpo": f"white(sum_k w_k (r_k - mean of group) / (std of group + {EPS:g}))",
    "teacher": "log teacher - log old, for each token",
}
AGGREGATIONS = {
    "token": "1/N sum over the N tokens of the step",
    "seq": "1/S sum over the S completions of 1/L sum over its L tokens",
    "const": "1/(S max_new_tokens) sum over the tokens of the S completions",
    "group": "1/P sum over the P prompts of the mean over their tokens",
}


def resolve(cfg: Algorithm) -> Resolved:
    """The preset with the config's own settings over it."""
    values = {**PRESETS[cfg.preset]}
    values |= {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) is not None}
    del values["preset"]
    outer = {f.name for f in dataclasses.fields(Resolved)}
    found = Resolved(**{key: value for key, value in values.items() if key in outer})
    objective = Objective(
        kl_coef=found.kl_coef if found.kl_in == "loss" else 0.0,
        **{key: value for key, value in values.items() if key not in outer},
    )
    return dataclasses.replace(found, objective=objective)


def unread(cfg: Algorithm) -> list[tuple[str, str, str]]:
    """(what, key, fix) of every setting that the algorithm does not look at; it would be ignored."""
    found = resolve(cfg)
    readers = {
        "clip_low": ("loss", "clip"), "clip_high": ("loss", "clip"), "dual_clip": ("loss", "clip"),
        "ratio_cap": ("loss", "cispo"), "correction_cap": ("correction", "truncate"),
        "overlong_margin": ("overlong", "soft"),
    }  # fmt: skip
    wrong = []
    for key, (other, value) in readers.items():
        now = getattr(found if other == "overlong" else found.objective, other)
        read = now == value or (other == "correction" and now != "none")
        if getattr(cfg, key) is not None and not read:
            fix = f"leave it out, or set algorithm.{other}={value}"
            wrong.append((f"{other} is {now}, which does not look at it", f"algorithm.{key}", fix))
    if cfg.kl_in is not None and not found.kl_coef:
        fix = "leave it out, or set algorithm.kl_coef"
        wrong.append(("there is no divergence to put anywhere", "algorithm.kl_in", fix))
    return wrong


def formula(cfg: Algorithm, rollout: Rollout) -> list[str]:
    """What a run optimises, as lines to print."""
    found = resolve(cfg)
    o = found.objective
    ratio = "exp(mean over the completion of log pi - log old)" if o.ratio == "sequence" else "pi / old"
    terms = {
        "clip": f"-min(rho A, clip(rho, {1 - o.clip_low:g}, {1 + o.clip_high:g}) A)",
        "cispo": f"-min(rho, {o.ratio_cap:g}) A log pi, the ratio held constant",
        "reinforce": "-A log pi",
    }
    term = terms[o.loss] + (f", at most {o.dual_clip:g} |A| where A < 0" if o.loss == "clip" and o.dual_clip else "")
    trust = {
        "none": "1",
        "truncate": f"min(old / engine, {o.correction_cap:g})",
        "mask": f"old / engine, 0 outside of [{1 / o.correction_cap:.3g}, {o.correction_cap:g}]",
    }
    lines = [
        f"algorithm: {cfg.preset}",
        f"  A = {ADVANTAGES[found.advantage]}; {rollout.group} completions of each of {rollout.prompts} prompts",
        f"  l = w * ({term}); rho = {ratio}; w = {trust[o.correction]}",
        f"  loss = {AGGREGATIONS[found.aggregation]}",
    ]
    if found.kl_coef and found.kl_in == "loss":
        lines.append(f"  + {found.kl_coef:g} KL(pi || ref): pi / engine held constant, times (log pi - log ref)^2 / 2")
    if found.kl_coef and found.kl_in == "reward":
        lines.append(f"  each token earns -{found.kl_coef:g} (log old - log ref); A from what is still to come")
    if found.overlong == "mask":
        lines.append("  completions cut off at max_new_tokens are left out")
    if found.overlong == "soft":
        start = round(rollout.max_new_tokens * (1 - found.overlong_margin))
        lines.append(f"  r falls by up to 1 from {start} to {rollout.max_new_tokens} tokens")
    if found.dynamic_sampling:
        lines.append("  groups that all earn the same are replaced by other prompts")
    return lines
