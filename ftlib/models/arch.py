"""What a decoder is made of, as data. A family file turns Hugging Face's config.json into one `Arch`."""

from dataclasses import dataclass
from typing import Literal

from ftlib.layers.attention import Attn
from ftlib.layers.mlp import Mlp
from ftlib.layers.moe import Moe

NormSlot = Literal["attn_pre", "attn_post", "mlp_pre", "mlp_post"]
PRE_NORM: frozenset[NormSlot] = frozenset({"attn_pre", "mlp_pre"})
POST_NORM: frozenset[NormSlot] = frozenset({"attn_post", "mlp_post"})
SANDWICH: frozenset[NormSlot] = PRE_NORM | POST_NORM


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block: a mixer, a feed-forward part, and where norms sit around them."""

    mixer: Attn
    ffn: Mlp | Moe
    norms: frozenset[NormSlot] = PRE_NORM
    residual_scale: float = 1.0  # what a branch is multiplied with before it is added


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A whole decoder. Hybrids and alternating windows are just different tuples of layers."""

    vocab: int
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float
    zero_centered_norms: bool = False  # norms scale by 1 + weight
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits z become softcap * tanh(z / softcap)
    tied: bool = False  # the output head is the embedding matrix
    max_positions: int | None = None  # the longest sequence the checkpoint was made for, if it says

    @property
    def sinks(self) -> bool:
        """Whether a layer's queries may look at nothing."""
        return any(getattr(layer.mixer, "sinks", False) for layer in self.layers)

    @property
    def ssmax(self) -> float | None:
        """Where the factor of scalable softmax begins, None without it."""
        return getattr(self.layers[-1].mixer, "ssmax", None)

    @property
    def softcap(self) -> bool:
        """Whether any layer caps its attention scores softly."""
        return any(getattr(layer.mixer, "softcap", None) is not None for layer in self.layers)

    @property
    def head_dims(self) -> set[int]:
        """How many channels heads have; layers may differ."""
        return {layer.mixer.head_dim for layer in self.layers}

    @property
    def long_after(self) -> int | None:
        """The length past which every token of a sequence is turned differently (LongRoPE): a cache is void then."""
        ropes = [layer.mixer.rope for layer in self.layers]
        return next((r.scaling.original_max_positions for r in ropes if r is not None and r.needs_lengths), None)
