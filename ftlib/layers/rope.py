"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, the band between is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def apply(self, inv_freq: Tensor) -> Tensor:
        turns = self.original_max_positions * inv_freq / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return inv_freq * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every position divided by `factor`."""

    factor: float

    def apply(self, inv_freq: Tensor) -> Tensor:
        return inv_freq / self.factor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Which channels of a head turn, and how fast."""

    dim: int  # rotated channels of each head, the first ones
    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | None = None

    def table(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [B, T, dim / 2], for integer positions [B, T]."""
        steps = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=torch.int64).float()
        inv_freq = 1.0 / self.theta ** (steps / self.dim)
        if self.scaling is not None:
            inv_freq = self.scaling.apply(inv_freq)
        angle = position_ids[..., None].float() * inv_freq
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 * cos.shape[-1] channels of x [B, T, H, D], paired as halves (i, i + dim / 2)."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
