"""A smaller model that learns what a larger one thinks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlib.config import LocalOrHub


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The teacher and how the student's distribution is compared with its."""

    teacher: LocalOrHub  # a model with the student's vocabulary: folder or Hub id
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"  # KL(teacher, student), the other way, between
    beta: float = 0.5  # js: weight of the teacher in the mixture that both are compared with
    temperature: float = 1.0  # logits are divided by it; the loss is multiplied by its square
    hard: float = 0.0  # share of plain cross-entropy on the labels, from 0 to 1
    stored: Path | None = None  # folder of the teacher's top_k; made by the first run, which later ones train from
    top_k: int = 64  # stored: most likely tokens kept for each position; all others count as one

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature: must be above 0")
        if not 0 < self.beta < 1:
            raise ValueError("beta: must lie between 0 and 1")
        if not 0 <= self.hard <= 1:
            raise ValueError("hard: must lie between 0 and 1")
        if self.stored is not None and self.temperature != 1:
            raise ValueError("temperature: a stored teacher has kept its probabilities at 1; leave one of the two out")
        if self.top_k < 1:
            raise ValueError("top_k: must be at least 1")
        if self.divergence != "js" and self.beta != Distill.beta:
            raise ValueError(f"beta: only divergence=js reads it, and this is {self.divergence}")
        if self.stored is None and self.top_k != Distill.top_k:
            raise ValueError("top_k: only a stored teacher has been cut to them; name a folder in stored")
