"""NF4 codes to weights in one Triton kernel: 0.52 bytes read and 2 written for each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftlib.kernels.nf4 import BLOCK, GROUP, LEVELS

BYTES = 2048  # codes of one program


def dequantize_nf4(
    codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """As `ftlib.kernels.nf4.dequantize_reference`. `out` may be a part of a wider matrix: [out, in], its rows apart."""
    if out is None:
        out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    levels = _levels(codes.device)
    count = codes.numel()
    _dequantize[(triton.cdiv(count, BYTES),)](
        codes, scales, steps, mean, levels, out,
        COUNT=count, WIDTH=out.shape[1], APART=out.stride(0), BYTES=BYTES, BLOCK=BLOCK, GROUP=GROUP,
    )  # fmt: skip
    return out


_LEVELS: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(LEVELS, device=device)
    return _LEVELS[device]


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, steps, mean, levels, out,  # noqa: ANN001
    COUNT: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr,
    BYTES: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < COUNT
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    block = (at * 2) // BLOCK
    scale = tl.load(scales + block, mask=inside, other=0).to(tl.float32)
    scale = tl.load(mean) + scale * tl.load(steps + block // GROUP, mask=inside, other=0.0)
    first = tl.load(levels + (code >> 4)) * scale
    second = tl.load(levels + (code & 15)) * scale
    where = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    value = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + where + where // WIDTH * (APART - WIDTH), value, mask=where < 2 * COUNT)
