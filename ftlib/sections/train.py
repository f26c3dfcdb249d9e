"""Which weights train."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Train:
    """A part of the weights, by regular expressions found anywhere in a parameter's name in the checkpoint."""

    only: tuple[str, ...] = ()  # these train, the rest is frozen: `layers\.2[0-9]\.`, `lm_head`
    freeze: tuple[str, ...] = ()  # these do not: `embed_tokens`, `norm`


@dataclass(frozen=True, kw_only=True)
class Lisa:
    """A few layers train at a time, drawn anew now and then; embedding and head always do (arXiv 2403.17919)."""

    layers: int = 0  # that train at a time: gradients and optimizer state of so many exist; 2 is usual, 0: of all
    every: int = 20  # steps until others are drawn

    def __post_init__(self) -> None:
        if self.layers < 0 or self.every < 1:
            raise ValueError("layers: must not be negative, and every at least 1; layers 0 trains all")
