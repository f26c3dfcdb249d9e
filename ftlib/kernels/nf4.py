"""NF4 with double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3).

A weight [out, in] is cut into blocks of 64 along `in`. A block is its largest magnitude, the scale, times 16 levels
that a normal variable falls between equally often; a weight is the index of the nearest. The scales, less their mean
over the whole matrix, are 8-bit integers in groups of 256: 4.127 bits a weight in all.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK, GROUP = 64, 256
# Appendix E of the paper: quantiles of N(0, 1) between offsets that give an exact zero, over their largest.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
Piece = tuple[int, int, int]  # dimension, start and length along it
CHUNK = 1 << 24  # weights looked up at a time: the indices take 8 bytes each


def empty(shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
    """Storage of a matrix [out, in]; `in` must be a multiple of 64.

    codes uint8 [out, in / 2], the earlier weight in the high half; scales int8 [out * in / 64]; steps float32, one for
    each 256 scales; mean float32 [1]. Scale i is mean + scales[i] * steps[i // 256].
    """
    blocks = shape[0] * shape[1] // BLOCK
    return {
        "codes": torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8, device=device),
        "scales": torch.empty(blocks, dtype=torch.int8, device=device),
        "steps": torch.empty(-(-blocks // GROUP), dtype=torch.float32, device=device),
        "mean": torch.empty(1, dtype=torch.float32, device=device),
    }


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Parts of a matrix [out, in] of any float dtype, as `empty` describes them."""
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1).float()
    mean = largest.mean()
    off = largest - mean
    padded = torch.nn.functional.pad(off, (0, -len(off) % GROUP)).view(-1, GROUP)
    steps = padded.abs().amax(1) / 127
    scales = (padded / steps.clamp_min(1e-30)[:, None]).round().to(torch.int8).flatten()[: len(off)]
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(blocks), CHUNK // BLOCK):
        part = blocks[start : start + CHUNK // BLOCK].float()
        exact = largest[start : start + CHUNK // BLOCK, None].clamp_min(1e-30)
        index = torch.bucketize(part / exact, between).to(torch.uint8).view(-1, 2)
        codes[start * BLOCK // 2 :][: len(index)] = index[:, 0] << 4 | index[:, 1]
    return {"codes": codes.view(len(weight), -1), "scales": scales, "steps": steps, "mean": mean[None]}


def group(scales: Tensor, steps: Tensor) -> int:
    """How many scales share a step: a power of two, 256 unless the parts were `cut` from others."""
    return 1 << (-(-len(scales) // len(steps)) - 1).bit_length()


def cut(parts: dict[str, Tensor], shape: Sequence[int], piece: Piece) -> dict[str, Tensor]:
    """Parts of a piece of a matrix or of a stack of them [..., in]: the same values to the bit.

    A piece of the last dimension begins and ends between blocks. Where it does not hold whole groups of scales, a step
    is kept for each smaller run of them.
    """
    dim, start, length = piece
    scales, steps, inner = parts["scales"], parts["steps"], [*shape[:-1], shape[-1] // BLOCK]
    if dim == len(shape) - 1:
        start, length = start // BLOCK, length // BLOCK
    places = torch.arange(len(scales), device=scales.device).view(inner).narrow(dim, start, length).flatten()
    each = math.prod(inner[dim + 1 :])  # blocks that lie together
    run = math.gcd(group(scales, steps), each * inner[dim], each * start, each * length)
    codes = parts["codes"].view(*inner, BLOCK // 2).narrow(dim, start, length)
    return {
        "codes": codes.reshape(-1, codes.shape[-2] * codes.shape[-1]),
        "scales": scales[places],
        "steps": steps[places[::run] // group(scales, steps)],
        "mean": parts["mean"],
    }


def dequantize(
    codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The matrix [out, in] that the parts stand for, computed in float32; into `out`, if there is one."""
    if codes.device.type == "cuda":
        from ftlib.kernels.nf4_triton import dequantize_blocks  # Triton is there where there is a GPU

        return dequantize_blocks(codes, scales, steps, mean, _levels(codes.device), group(scales, steps), dtype, out)
    whole = dequantize_reference(codes, scales, steps, mean, dtype)
    return whole if out is None else out.copy_(whole)


_LEVELS: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    """`LEVELS` on a device, copied there once."""
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(LEVELS, device=device)
    return _LEVELS[device]


def dequantize_reference(codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch operations: the oracle."""
    levels = torch.tensor(LEVELS, device=codes.device)
    values = levels[torch.stack((codes >> 4, codes & 15), -1).long()].view(-1, BLOCK)
    scale = mean + scales.float() * steps.repeat_interleave(group(scales, steps))[: len(scales)]
    return (values * scale[:, None]).to(dtype).view(len(codes), -1)
