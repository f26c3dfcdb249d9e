"""NF4 codes to weights in one Triton kernel: 0.52 bytes read and 2 written for each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 64  # of one program


def dequantize_blocks(
    codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor, levels: Tensor, group: int, dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The matrix [out, in] of 4-bit codes of `levels` float32 [16], in blocks that share a scale, `group` of which
    share a step: mean + scale * step. `out` may be a part of a wider matrix, its rows apart."""
    if out is None:
        out = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype, device=codes.device)
    blocks = len(scales)
    block = codes.numel() * 2 // blocks
    _dequantize[(triton.cdiv(blocks, BLOCKS),)](
        codes, scales, steps, mean, levels, out, blocks, out.stride(0),
        ROW=out.shape[1] // block, BLOCKS=BLOCKS, BLOCK=block, GROUP=group,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, steps, mean, levels, out, blocks, apart,  # noqa: ANN001
    ROW: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # what is one number a block is computed once a block
    inside = block < blocks
    scale = tl.load(scales + block, mask=inside, other=0).to(tl.float32)
    scale = tl.load(mean) + scale * tl.load(steps + block // GROUP, mask=inside, other=0.0)
    byte, value = tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK)
    at = block.to(tl.int64)[:, None] * (BLOCK // 2) + byte[None, :]
    code = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(levels + (code >> 4)) * scale[:, None]
    second = tl.load(levels + (code & 15)) * scale[:, None]
    start = (block // ROW).to(tl.int64) * apart + block % ROW * BLOCK
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + start[:, None] + value[None, :], values, mask=inside[:, None])
