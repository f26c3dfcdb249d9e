"""Low-rank adapters."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W x + (alpha / rank) B A x on the named linear layers; W is frozen (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] | str = "all-linear"  # names ending in (`q_proj`), a regular expression, or `all-linear`

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: must be in [0, 1)")
