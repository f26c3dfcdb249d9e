"""Models that score."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What is scored, and the loss."""

    kind: Literal["pairs", "steps"] = "pairs"  # whole answers, from pairs of them; or each step of an answer
    centre: float = 0.01  # pairs: weight of (sum of both scores)^2, which keeps scores around 0
    margin: bool = True  # pairs: scores must differ by the row's margin, where it has one
    share_prompt: bool | Literal["auto"] = False  # pairs: both behind one copy of it; auto: where that saves a fifth
    separator: str = "\n"  # steps: what ends one; a single token of the tokenizer
    last_step: bool = False  # steps: only the last one of an answer is judged

    def __post_init__(self) -> None:
        for key in ("separator", "last_step") if self.kind == "pairs" else ("centre", "margin", "share_prompt"):
            if getattr(self, key) != getattr(type(self), key):
                other = "steps" if self.kind == "pairs" else "pairs"
                raise ValueError(f"{key}: is for kind {other}, and this is {self.kind}; leave it out")
        if self.centre < 0:
            raise ValueError("centre: must not be negative")
        if not self.separator:
            raise ValueError("separator: must not be empty")
