"""One scale a row: int8 integers, or float8 with 4 bits of exponent and 3 of fraction."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ftlib.kernels.capability import FP8
from ftlib.kernels.nf4 import Piece

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def empty(shape: tuple[int, int], device: torch.device | str, kind: torch.dtype) -> dict[str, Tensor]:
    """Storage of a matrix [out, in]: codes of dtype `kind` [out, in], scales float32 [out]."""
    return {
        "codes": torch.empty(shape, dtype=kind, device=device),
        "scales": torch.empty(shape[0], dtype=torch.float32, device=device),
    }


def quantize(weight: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
    """Parts of a matrix [out, in]: its rows over their scales, rounded to the nearest."""
    scales = weight.abs().amax(1).float().clamp_min(1e-30) / LARGEST[kind]
    scaled = weight.float() / scales[:, None]
    return {"codes": (scaled.round() if kind is torch.int8 else scaled).to(kind), "scales": scales}


def cut(parts: dict[str, Tensor], shape: Sequence[int], piece: Piece) -> dict[str, Tensor]:
    """Parts of a piece of a matrix or of a stack of them [..., in]: the same values."""
    dim, start, length = piece
    codes, scales = parts["codes"].view(*shape).narrow(dim, start, length), parts["scales"]
    if dim < len(shape) - 1:
        scales = scales.view(*shape[:-1]).narrow(dim, start, length).flatten()
    return {"codes": codes.reshape(-1, codes.shape[-1]), "scales": scales}


def empty_turned(shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
    """The same for e4m3, and the codes transposed [in, out]."""
    kept = empty(shape, device, torch.float8_e4m3fn)
    return kept | {"turned": torch.empty(*shape[::-1], dtype=torch.float8_e4m3fn, device=device)}


def quantize_turned(weight: Tensor) -> dict[str, Tensor]:
    """Parts as `empty_turned` has them."""
    kept = quantize(weight, torch.float8_e4m3fn)
    return kept | {"turned": kept["codes"].t().contiguous()}


def cut_turned(parts: dict[str, Tensor], shape: Sequence[int], piece: Piece) -> dict[str, Tensor]:
    """The same of a matrix in e4m3 with its transpose."""
    dim, *where = piece
    return cut(parts, shape, piece) | {"turned": parts["turned"].narrow(1 - dim, *where)}


def dequantize_turned(
    codes: Tensor, scales: Tensor, turned: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """As `dequantize`; the transposed codes say nothing more."""
    return dequantize(codes, scales, dtype, out)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix [out, in] that the parts stand for, computed in float32; into `out`, if there is one."""
    if codes.device.type == "cuda" and _one_pass(codes.dtype, codes.device):
        from ftlib.kernels.rowwise_triton import dequantize_rows  # Triton is there where there is a GPU

        return dequantize_rows(codes, scales, dtype, out)
    whole = dequantize_reference(codes, scales, dtype)
    return whole if out is None else out.copy_(whole)


@cache
def _one_pass(kind: torch.dtype, device: torch.device) -> bool:
    """Whether Triton reads such codes on this GPU."""
    return kind is torch.int8 or torch.cuda.get_device_capability(device) >= FP8


def dequantize_reference(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch operations: the oracle."""
    return (codes.to(torch.float32) * scales[:, None]).to(dtype)
