"""How a frozen matrix is kept in fewer bits, and made whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ftlib.kernels import nf4
from ftlib.quant import rowwise


@dataclass(frozen=True)
class Format:
    """How a matrix [out, in] is kept; `in` must be a multiple of `block`."""

    empty: Callable[[tuple[int, int], torch.device | str], dict[str, Tensor]]
    quantize: Callable[[Tensor], dict[str, Tensor]]
    dequantize: Callable[..., Tensor]  # (*parts, dtype, out=None)
    cut: Callable[[dict[str, Tensor], Sequence[int], nf4.Piece], dict[str, Tensor]]  # parts of a piece
    block: int = 1


def _rowwise(kind: torch.dtype) -> Format:
    quantize = partial(rowwise.quantize, kind=kind)
    return Format(partial(rowwise.empty, kind=kind), quantize, rowwise.dequantize, rowwise.cut)


FORMATS = {
    "nf4": Format(nf4.empty, nf4.quantize, nf4.dequantize, nf4.cut, nf4.BLOCK),
    "int8": _rowwise(torch.int8),
    "fp8": _rowwise(torch.float8_e4m3fn),
    "fp8_turned": Format(rowwise.empty_turned, rowwise.quantize_turned, rowwise.dequantize_turned, rowwise.cut_turned),
}
