"""Codes with one scale a row to weights in one Triton kernel: a byte read and 2 written for each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 1024  # of one program


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix [out, in] of `codes`, int8 or float8 e4m3, times `scales` float32 [out]. Either matrix may be a part
    of a wider one, its rows apart."""
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, columns = codes.shape
    _dequantize[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        codes, scales, out, rows, columns, codes.stride(0), out.stride(0), ROWS=ROWS, COLUMNS=COLUMNS
    )
    return out


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, out, rows, columns, between, apart,  # noqa: ANN001
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    code = tl.load(codes + row[:, None] * between + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values = (code * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * apart + column[None, :], values, mask=inside)
