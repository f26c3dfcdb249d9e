"""What a decoder is made of, as data. A family file turns Hugging Face's config.json into one `Arch`."""

from dataclasses import dataclass
from typing import Literal

from ftlib.layers.attention import Attn
from ftlib.layers.mlp import Mlp

NormSlot = Literal["attn_pre", "attn_post", "mlp_pre", "mlp_post"]
PRE_NORM: frozenset[NormSlot] = frozenset({"attn_pre", "mlp_pre"})


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block: a mixer, a feed-forward part, and where norms sit around them."""

    mixer: Attn
    ffn: Mlp
    norms: frozenset[NormSlot] = PRE_NORM


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A whole decoder. Hybrids and alternating windows are just different tuples of layers."""

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool = False  # the output head is the embedding matrix
    max_positions: int | None = None  # the longest sequence the checkpoint was made for, if it says
