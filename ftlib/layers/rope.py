"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every position divided by `factor`."""

    factor: float
    gain = 1.0  # what cos and sin are multiplied with

    def apply(self, inv_freq: Tensor) -> Tensor:
        return inv_freq / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, the band between is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    gain = 1.0

    def apply(self, inv_freq: Tensor) -> Tensor:
        turns = self.original_max_positions * inv_freq / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0, 1)
        return inv_freq * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): channels that turn rarely are slowed, those that turn often kept.

    `gain` multiplies cos and sin, and so sharpens attention. `truncate`: the band's edges are whole channels.
    """

    factor: float
    theta: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    gain: float
    truncate: bool

    def apply(self, inv_freq: Tensor) -> Tensor:
        half = inv_freq.shape[-1]
        low, high = self._channel(self.beta_fast, half), self._channel(self.beta_slow, half)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001
        ramp = ((torch.arange(half, device=inv_freq.device, dtype=torch.float32) - low) / width).clamp(0, 1)
        return inv_freq / self.factor * ramp + inv_freq * (1 - ramp)

    def _channel(self, turns: float, half: int) -> float:
        """The channel that makes `turns` turns over the original range."""
        return half * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(self.theta)


@dataclass(frozen=True, kw_only=True)
class LongScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): each channel slowed by its own factor, and by another list in
    sequences longer than `original_max_positions`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    gain: float

    def apply(self, inv_freq: Tensor) -> Tensor:
        return inv_freq / torch.tensor(self.short, device=inv_freq.device)

    def apply_long(self, inv_freq: Tensor) -> Tensor:
        return inv_freq / torch.tensor(self.long, device=inv_freq.device)


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


class Turns(NamedTuple):
    """What a batch's positions do to queries and keys, float32."""

    cos: Tensor  # [B, T, dim / 2]
    sin: Tensor
    query: Tensor | None  # [B, T]: what queries are multiplied with


@dataclass(frozen=True, kw_only=True)
class QueryScale:
    """Queries grow with their position p: times 1 + beta * log(1 + p // original_max_positions), as in Llama 4."""

    beta: float
    original_max_positions: int

    def at(self, position_ids: Tensor) -> Tensor:
        return 1 + self.beta * torch.log1p(torch.floor(position_ids / self.original_max_positions))


@dataclass(frozen=True)
class LogKeys:
    """Queries at position p times log(p + 1), of the keys they see: scalable softmax, whose s the layer has."""

    def at(self, position_ids: Tensor) -> Tensor:
        return torch.log1p(position_ids.float())


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Which channels of a head turn, and how fast."""

    dim: int  # rotated channels of each head, the first ones
    theta: float = 10_000.0
    interleaved: bool = False  # channels are paired (0, 1), (2, 3) … instead of as halves
    scaling: Scaling | None = None
    query_scale: QueryScale | LogKeys | None = None

    @property
    def needs_lengths(self) -> bool:
        """Whether a token's rotation depends on how long its document is."""
        return isinstance(self.scaling, LongScaling)

    def table(self, position_ids: Tensor, lengths: Tensor | None = None) -> Turns:
        """For integer positions [B, T]; `lengths` [B, T], of each token's document, is read if `needs_lengths`."""
        steps = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=torch.int64).float()
        inv_freq = 1.0 / self.theta ** (steps / self.dim)
        gain = 1.0
        if self.scaling is not None:
            plain, gain = inv_freq, self.scaling.gain
            inv_freq = self.scaling.apply(plain)
            if self.needs_lengths:
                past = (lengths > self.scaling.original_max_positions)[..., None]
                inv_freq = torch.where(past, self.scaling.apply_long(plain), inv_freq)
        angle = position_ids[..., None].float() * inv_freq
        query = None if self.query_scale is None else self.query_scale.at(position_ids)
        return Turns(angle.cos() * gain, angle.sin() * gain, query)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first 2 * cos.shape[-1] channels of x [B, T, H, D], paired as halves (i, i + dim / 2) or neighbours."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        both = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
        return torch.cat((both.flatten(-2), rest), -1)
    first, second = turned[..., :half], turned[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
