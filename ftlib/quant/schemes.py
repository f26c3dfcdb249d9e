"""Weights and activations rounded to few bits: what a quantized model computes with, and what is stored of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


@dataclass(frozen=True)
class Scheme:
    """`codes(weight [out, in], group)` -> codes [out, in], scales [out, groups] of the weight's dtype; `inputs(x)`
    rounds activations [..., in] token by token, None: they stay."""

    codes: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    inputs: Callable[[Tensor], Tensor] | None
    grouped: bool  # else a scale a row

    def weight(self, weight: Tensor, group: int) -> Tensor:
        """The matrix that is computed with."""
        return restore(*self.codes(weight, group))


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [...] float32 rounded to the nearest numbers of `dtype`, in `dtype`.

    By integer arithmetic: compiled code leaves out a cast to bfloat16 that is followed by one back, and what is trained
    with would not be what is stored.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    bits = x.float().view(torch.int32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # ties to even
    return torch.where(x.isnan(), x, nearest.view(torch.float32)).to(dtype)


def restore(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix [out, in] that codes and scales [out, groups] stand for, in the dtype of the scales."""
    groups = codes.float().unflatten(1, (scales.shape[1], -1))
    return (groups * scales.float()[..., None]).flatten(1).to(scales.dtype)


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Integers from -7 to 7, the largest of each group at an end."""
    groups = weight.unflatten(1, (-1, group)).float()
    scales = kept(_largest(groups) * (1 / 7.0), weight.dtype)  # as a compiler writes a division by a constant
    return (groups / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(1), scales


def to_fp8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Float8 e4m3, the largest of each row at its end."""
    scales = kept(_largest(weight.float()) * (1 / LARGEST), weight.dtype)[:, None]
    return (weight.float() / scales.float()).clamp(-LARGEST, LARGEST).to(E4M3), scales


def int8_tokens(x: Tensor) -> Tensor:
    """x [..., in] with each token rounded to 255 steps between its largest magnitude and minus it."""
    scales = _largest(x.float())[..., None] / 127.5
    return ((x.float() / scales).round().clamp(-128, 127) * scales).to(x.dtype)


def fp8_tokens(x: Tensor) -> Tensor:
    """x [..., in] with each token in e4m3, its largest magnitude at the end."""
    scales = _largest(x.float())[..., None] / LARGEST
    return ((x.float() / scales).clamp(-LARGEST, LARGEST).to(E4M3).float() * scales).to(x.dtype)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1).clamp_min(1e-30)


SCHEMES = {
    "int4": Scheme(to_int4, None, grouped=True),
    "int8_int4": Scheme(to_int4, int8_tokens, grouped=True),
    "fp8": Scheme(to_fp8, fp8_tokens, grouped=False),
}
