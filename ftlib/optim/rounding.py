"""Stochastic rounding to bfloat16, with noise that is a function of where and when."""

import torch
from torch import Tensor

# lowbias32 of Chris Wellons' hash prospector: each bit of its input turns nearly half of the bits of its output.
FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))


def noise(first: Tensor, shape: tuple[int, int], key: Tensor) -> Tensor:
    """int32 [rows, columns] in 0 … 65535 for the elements from `first` on of a tensor; `first`, `key` int32 scalars.

    A counter in place of a generator: the same for equal `key` and place, so that a run that goes on, and a tensor in
    shards, round as they would have.
    """
    rows, columns = (torch.arange(n, dtype=torch.int32, device=key.device) for n in shape)
    x = rows[:, None] * shape[1] + columns + first
    return _mixed(_mixed(x) ^ key) & 0xFFFF


def to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """float32 -> one of the two bfloat16 around each x, the nearer the likelier: right on average.

    Adding 16 random bits below those that stay carries into them as often as what is cut off says.
    """
    return (((x.view(torch.int32) + noise) >> 16) << 16).view(torch.float32).bfloat16()


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * FACTORS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * FACTORS[1]
    return x ^ ((x >> 16) & 0xFFFF)
