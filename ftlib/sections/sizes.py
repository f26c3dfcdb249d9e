"""A model's sizes, its first weights and its range."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What differs from the sizes in model.path's config.json; the rest follows in proportion. From scratch only."""

    layers: int | None = None
    dim: int | None = None  # width of the hidden states
    heads: int | None = None  # of queries; null: as many as keep the head's size
    head_dim: int | None = None  # channels of a head; null: the published ones, or dim / heads where those are that
    kv_heads: int | None = None  # of keys and values; null: in proportion to heads
    hidden: int | None = None  # width of the feed-forward layer; null: in proportion to dim
    vocab: int | None = None  # rows of the embedding
    experts: int | None = None  # of a mixture
    experts_per_token: int | None = None  # of them; null: the published ones

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1")
        if (self.head_dim or 0) % 2:
            raise ValueError("head_dim: must be even, as channels turn in pairs")

    @property
    def changed(self) -> bool:
        """Whether any size is set."""
        return any(value is not None for value in self.__dict__.values())


@dataclass(frozen=True, kw_only=True)
class Init:
    """How fresh weights are drawn: N(0, std), norms neutral, biases 0."""

    std: float | None = None  # null: the family's own, initializer_range of config.json
    scaled: bool = True  # matrices that write to the residual stream over sqrt(2 x layers), as in GPT-2

    def __post_init__(self) -> None:
        if self.std is not None and self.std <= 0:
            raise ValueError("std: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A longer range than the model was made for."""

    length: int | None = None  # tokens; the rope is scaled for them by YaRN. null: the model's own range
    ssmax: float | None = None  # scores times s log(keys), first s, then learned (arXiv 2501.19399): 0.168
    skip: bool = False  # rows stay short, and positions jump once in each document, up to the range (PoSE)

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError("length: must be at least 1")
        if self.ssmax is not None and self.ssmax <= 0:
            raise ValueError("ssmax: must be above 0, or null for plain softmax")

    @property
    def changed(self) -> bool:
        """Whether the model is another one by this."""
        return self.length is not None or self.ssmax is not None
