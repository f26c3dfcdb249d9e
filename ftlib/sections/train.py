"""Which weights train."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Train:
    """A part of the weights, by regular expressions found anywhere in a parameter's name in the checkpoint."""

    only: tuple[str, ...] = ()  # these train, the rest is frozen: `layers\.2[0-9]\.`, `lm_head`
    freeze: tuple[str, ...] = ()  # these do not: `embed_tokens`, `norm`
