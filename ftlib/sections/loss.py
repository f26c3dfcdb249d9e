"""What a token's loss counts, and which tokens are predicted."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross-entropy, or cross-entropy with a weight for each token that the model's own certainty decides."""

    name: Literal["cross_entropy", "dft", "eaft"] = "cross_entropy"  # dft, eaft: ftlib/losses/weighted.py
    eaft_alpha: float = 1.0  # exponent of EAFT's entropy
    eaft_k: int = 20  # logits that EAFT takes the entropy of
    z_loss: float = 0.0  # adds so much times log(Z)^2 for each target, Z the sum of exp(logits); 1e-4 is usual
    router_aux: float = 0.0  # times how unevenly experts are used (ftlib/losses/balancing.py); 0.001 to 0.02 is usual

    def __post_init__(self) -> None:
        if min(self.z_loss, self.eaft_alpha, self.router_aux) < 0:
            raise ValueError("z_loss, eaft_alpha and router_aux: must not be negative")
        if self.eaft_k < 2:
            raise ValueError("eaft_k: must be at least 2")
        if self.name != "eaft" and (self.eaft_alpha, self.eaft_k) != (Loss.eaft_alpha, Loss.eaft_k):
            raise ValueError("eaft_alpha, eaft_k: only name=eaft reads them")

    @property
    def plain(self) -> bool:
        """Whether what is summed over targets is nothing but cross-entropy."""
        return self.name == "cross_entropy" and not self.z_loss


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """Multi-token prediction: modules that also learn the tokens after the next one (DeepSeek-V3, arXiv 2412.19437)."""

    depth: int = 0  # modules, each a block that predicts one token further; they are saved beside the model. 0: none
    weight: float = 0.3  # of their loss, lambda

    def __post_init__(self) -> None:
        if self.depth < 0 or self.weight <= 0:
            raise ValueError("depth: must not be negative, nor weight 0 or less; depth 0 switches it off")
