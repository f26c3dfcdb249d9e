"""What every generation engine takes and returns."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftlib.errors import UserError

READ = ("temperature", "top_p", "top_k", "min_p")  # of generation_config.json


def listed(generation_config: Mapping[str, Any]) -> dict[str, float]:
    """How a model's folder says that it is sampled; as in transformers, only where its `do_sample` is true."""
    if not generation_config.get("do_sample"):
        return {}
    return {key: generation_config[key] for key in READ if isinstance(generation_config.get(key), int | float)}


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    `top_k`, `top_p` and `min_p` leave only likely tokens, in this order; a draw's log-probability is that of the whole
    distribution at the temperature all the same, as a trainer computes it.
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token, log-probabilities as at 1
    top_p: float = 1.0  # the likeliest tokens that together reach this probability; 1: all
    top_k: int = 0  # so many of the likeliest tokens; 0: all
    min_p: float = 0.0  # tokens at least this many times as likely as the likeliest
    stop_ids: frozenset[int] = frozenset()  # a completion ends with, and contains, the first of these
    seed: int = 0
    logprobs: bool = True  # false: completions carry none

    def __post_init__(self) -> None:
        bad = {
            "max_new_tokens: at least 1": self.max_new_tokens < 1,
            "temperature: not negative": not self.temperature >= 0,
            "top_p: above 0, at most 1": not 0 < self.top_p <= 1,
            "top_k: not negative": self.top_k < 0,
            "min_p: from 0 to 1": not 0 <= self.min_p <= 1,
        }
        if any(bad.values()):
            raise UserError("; ".join(rule for rule, broken in bad.items() if broken), where="sampling")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    def key(self, request: int) -> tuple[int, int]:
        """Two 32-bit words for the draws of request number `request`: another stream for each (seed, request)."""
        digest = hashlib.blake2b(f"{self.seed}:{request}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class Completion:
    """Token ids drawn after a prompt, and the log-probability of each at the temperature it was drawn at."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
