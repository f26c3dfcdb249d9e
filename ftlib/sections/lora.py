"""Low-rank adapters."""

from dataclasses import dataclass
from typing import Literal

from ftlib.config import LocalOrHub


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W x + (alpha / rank) B A x on the named linear layers; W is frozen (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] | str = "all-linear"  # names ending in (`q_proj`), a regular expression, or `all-linear`
    rslora: bool = False  # scale by alpha / sqrt(rank): high ranks learn as fast as low ones (arXiv 2312.03732)
    dora: bool = False  # also learn the length of each row of W (arXiv 2402.09353); slower, no fused kernel
    # pissa, olora: start as W's main part; loftq: as the main part of what model.quantize loses
    init: Literal["kaiming", "gaussian", "pissa", "olora", "loftq"] = "kaiming"
    lr_ratio: float = 1.0  # LoRA+ (arXiv 2402.12354): learning rate of B, as a multiple of optim.lr; 16 is usual
    rank_pattern: dict[str, int] = None  # end of a layer's name, as a regular expression -> its own rank
    alpha_pattern: dict[str, float] = None  # the same for alpha
    modules_to_save: tuple[str, ...] = ()  # trained whole and saved with the adapter: `lm_head`, `embed_tokens`, `norm`
    start_from: LocalOrHub | None = None  # continue this adapter (PEFT format): its rank, alpha and targets hold

    def __post_init__(self) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            if getattr(self, key) is None:
                object.__setattr__(self, key, {})
        if self.targets in ("all", "all_linear"):
            raise ValueError(f"targets: {self.targets!r} is no layer; all linear layers are all-linear")
        if self.rank < 1:
            raise ValueError("rank: must be at least 1")
        if not all(alpha > 0 for alpha in (self.alpha, *self.alpha_pattern.values())):
            raise ValueError("alpha, alpha_pattern: must be above 0, twice the rank is usual")
        if any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError("rank_pattern: every rank must be at least 1; leave a layer out of targets to skip it")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: must be in [0, 1)")
        if self.dora and self.init == "loftq":
            raise ValueError("init: loftq is for plain adapters, not for dora")
        if self.lr_ratio <= 0:
            raise ValueError("lr_ratio: must be above 0; 1 is plain LoRA")


@dataclass(frozen=True, kw_only=True)
class Relora:
    """Merge the adapter into the base now and then and begin a new one, so that all of them together reach a rank that
    one does not (arXiv 2307.05695). `final/` is then a whole model."""

    every: int = 0  # steps between two merges; 0: never, which is plain LoRA
    warmup_steps: int = 50  # after each, over which the learning rate rises from 0 back to its schedule
    keep: float = 0.01  # share of AdamW's moments of the adapter, the largest, that outlasts a merge; 0: none

    def __post_init__(self) -> None:
        if min(self.every, self.warmup_steps) < 0:
            raise ValueError("every and warmup_steps: must not be negative")
        if self.every and self.warmup_steps >= self.every:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be fewer than the {self.every} of every")
        if not 0 <= self.keep < 1:
            raise ValueError("keep: must be in [0, 1)")
