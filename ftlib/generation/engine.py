"""What every generation engine takes and returns."""

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. Temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    stop_ids: frozenset[int] = frozenset()  # a completion ends with, and contains, the first of these


@dataclass(frozen=True)
class Completion:
    """Token ids drawn after a prompt, and the log-probability of each at the temperature it was drawn at."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Turns prompts into completions."""

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, n: int = 1, seed: int = 0
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (token ids). The draws of a completion depend on (seed, its index) alone."""
