"""Optimizer states in 8 and 4 bits: codes and one scale a block, plain tensors in and out.

A block is a stretch of one row of a matrix, so that shards of rows hold whole blocks and codes and scales are sharded
as the matrix is. On a GPU `ftlib.kernels.adamw_triton` does the same within a step.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

KINDS = {"int8": 256, "fp8": 256, "int4": 128}  # numbers in a block, at most
SMALLEST = 4096  # numbers in a matrix whose states are worth it
TOP, LEAST = 448.0, 2.0**-9  # largest and smallest positive float8_e4m3fn


def block_size(row: int, kind: str) -> int:
    """The largest even divisor of a row's length that is no longer than a block of `kind`; 0 below 16."""
    sizes = (n for n in range(KINDS[kind], 15, -1) if n % 2 == 0 and row % n == 0)
    return next(sizes, 0)


@cache
def book(kind: str, signed: bool, device: torch.device) -> Tensor:
    """The numbers that codes stand for, ascending, float32 [256] or [16]; none for fp8, whose codes are numbers.

    int8 is the dynamic tree of Dettmers et al. (2022, arXiv 2110.02861): decades from 1 down, each finer than the one
    below. int4 is that of Li et al. (2023, arXiv 2309.01507): three decades for the first moment, k / 16 for the
    second. The second moment is never 0 where its block is not, as they advise for 4 bits: a step divides by its root.
    """
    if kind == "fp8":
        return torch.zeros(0, device=device)
    if kind == "int4" and not signed:
        return torch.arange(1, 17, device=device) / 16
    decades, first = _tree(kind, signed)
    found = [torch.tensor([1.0], dtype=torch.float64)]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (i + first) + 1, dtype=torch.float64)
        found.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - decades))
    values = torch.cat(found)
    rest = torch.cat((torch.zeros(1), -values[values < 1])) if signed else torch.tensor([10.0**-decades])
    return torch.cat((rest, values)).sort()[0].to(device, torch.float32)


def encode(x: Tensor, kind: str, signed: bool, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [blocks, n] -> codes [blocks, n] (uint8; int4: [blocks, n / 2]; fp8: float8) and float32 scales [blocks].

    `numbers` is the `book`; each x becomes the nearest of them, times its block's largest magnitude."""
    scale = x.abs().amax(-1)
    x = x / torch.where(scale > 0, scale, 1.0)[:, None]
    if kind == "fp8":
        x = (x * TOP).clamp(-TOP if signed else LEAST, TOP)
        return x.to(torch.float8_e4m3fn), scale
    codes = torch.bucketize(x, (numbers[1:] + numbers[:-1]) / 2, out_int32=True)
    if kind == "int4":
        low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | (high << 4)
    return codes.to(torch.uint8), scale


def encode_moments(m: Tensor, v: Tensor, kind: str, tables: Sequence[Tensor | None]) -> list[Tensor]:
    """Codes and scales of the first and the second moment; `tables` of `kind`."""
    return [*encode(m, kind, True, tables[0]), *encode(v, kind, False, tables[1])]


def decode(codes: Tensor, scale: Tensor, kind: str, numbers: Tensor | None) -> Tensor:
    """float32 [blocks, n], the numbers that were nearest."""
    if kind == "fp8":
        return codes.float() * (scale / TOP)[:, None]
    codes = codes.int()
    if kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return numbers[codes] * scale[:, None]


@cache
def tables(kind: str, device: torch.device) -> tuple[Tensor | None, ...]:
    """What a kernel looks up, for both moments: their books, and what finds a number in one (`_cells`)."""
    if kind not in ("int8", "int4"):
        return (None,) * 4
    cells = (_cells(kind, signed).to(device) if kind == "int8" or signed else None for signed in (True, False))
    return book(kind, True, device), book(kind, False, device), *cells


def _cells(kind: str, signed: bool) -> Tensor:
    """What finds the positive number of a book of decades that is nearest to x by arithmetic, float32 [3, 16].

    The decade of x, counted from 1, is how many entries of row 0 are below x: middles between the last number of a
    decade and the first of the next. Among the positive numbers but the least, x is number x times row 1 plus row 2,
    rounded down, if that is one of its decade.
    """
    decades, first = _tree(kind, signed)
    values = book(kind, signed, torch.device("cpu")).double()
    values = values[values >= 0]  # the least, those of each decade, 1
    edges, factors, offsets = [], [0.0], [0.0]
    for i in range(decades):
        count, top, before = 2 ** (i + first), 10.0 ** (i + 1 - decades), 2 ** (i + first) - 2**first
        edges.append((values[before] + values[before + 1]).item() / 2)
        factors.append(count / (0.9 * top))
        offsets.append(before - count / 9)
    edges.append((values[-2] + values[-1]).item() / 2)
    return torch.tensor([row + [0.0] * (16 - len(row)) for row in (edges, factors, offsets)], dtype=torch.float32)


def _tree(kind: str, signed: bool) -> tuple[int, int]:
    """Decades of a book, and the power of two that the lowest one's count of numbers is."""
    return (7, 0 if signed else 1) if kind == "int8" else (3, 0)
