"""A step of AdamW in one Triton kernel: parameter, gradient and moments are read once and written once.

Moments may be codes in 8 or 4 bits with one scale a block, as `ftlib.optim.lowbit` has them, and bfloat16 parameters
rounded stochastically, as `ftlib.optim.rounding` has it: those say what is computed, and are what tests hold this to.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ftlib.kernels.mix_triton import mix

TILE = 1024  # numbers of one program: 8 of a thread, so that all operands lie in threads alike
WIDTH = 256  # columns that numbers without blocks are given
CELLS = tl.constexpr(16)  # in a row of `cells`


def adamw_triton(
    p: Tensor, grad: Tensor, slots: Sequence[Tensor], kind: str, tables: Sequence[Tensor | None],
    terms: Sequence[float], gate: Tensor | None, place: tuple[int, int] | None,
) -> None:  # fmt: skip
    """In place. p, grad [blocks, block], contiguous, float32, bfloat16 or float16; the rest is as
    `ftlib.optim.adamw.move_reference` has it."""
    block = p.shape[1] if kind else WIDTH
    columns = triton.next_power_of_2(block)
    rows = TILE // columns
    m, m_scale, v, v_scale = slots if kind else (slots[0], None, slots[1], None)
    first, key = place or (0, 0)
    _step[(triton.cdiv(triton.cdiv(p.numel(), block), rows),)](
        p, grad, m, m_scale, v, v_scale, *tables, gate, p.numel(), *terms, first, key,
        KIND=kind, STOCHASTIC=place is not None, ROWS=rows, BLOCK=block, COLUMNS=columns,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "key"])
def _step(  # noqa: ANN202
    p, grad, m_slot, m_scales, v_slot, v_scales, m_book, v_book, m_cells, v_cells, gate, numel,  # noqa: ANN001
    fresh, keep, fresh_sq, eps, shrink, length, bias, first, key,  # noqa: ANN001
    KIND: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * BLOCK + column[None, :]
    if gate is not None:
        numel = tl.where(tl.load(gate + 1) > 0, numel, 0)  # nothing is moved
    inside = (column < BLOCK)[None, :] & (at < numel)
    there = row * BLOCK < numel
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        g *= tl.load(gate).to(tl.float32)
    weight = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    m = _load(m_slot, m_scales, m_book, row, at, inside, there, KIND)
    v = _load(v_slot, v_scales, v_book, row, at, inside, there, KIND)
    m += (g - m) * fresh
    v = v * keep + g * g * fresh_sq
    weight = weight * shrink - length * m / (tl.sqrt(v) / bias + eps)
    if STOCHASTIC:
        bits = weight.to(tl.int32, bitcast=True) + _noise(at, first, key)
        weight = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    tl.store(p + at, weight.to(p.dtype.element_ty), mask=inside)
    _store(m, m_slot, m_scales, m_cells, row, at, inside, there, KIND, True, ROWS, BLOCK, COLUMNS)
    _store(v, v_slot, v_scales, v_cells, row, at, inside, there, KIND, False, ROWS, BLOCK, COLUMNS)


@triton.jit
def _load(slot, scales, book, row, at, inside, there, KIND: tl.constexpr):  # noqa: ANN001, ANN202
    if KIND == "":
        x = tl.load(slot + at, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.zeros(at.shape, tl.float32) + tl.load(scales + row, mask=there, other=0.0)[:, None]
        if KIND == "fp8":
            x *= tl.load(slot + at, mask=inside, other=0.0).to(tl.float32) / 448.0
        elif KIND == "int8":
            x *= _look(book, tl.load(slot + at, mask=inside, other=0).to(tl.int32), 256)
        else:
            code = tl.load(slot + (at >> 1), mask=inside, other=0).to(tl.int32)
            x *= _look(book, (code >> (4 * (at & 1)).to(tl.int32)) & 15, 16)
    return x


@triton.jit
def _look(table, index, SIZE: tl.constexpr):  # noqa: ANN001, ANN202
    """table[index], out of shared memory."""
    found = tl.gather(tl.load(table + tl.arange(0, SIZE)), tl.reshape(index, (index.shape[0] * index.shape[1],)), 0)
    return tl.reshape(found, index.shape)


@triton.jit
def _store(  # noqa: ANN202
    x, slot, scales, cells, row, at, inside, there,  # noqa: ANN001
    KIND: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if KIND == "":
        tl.store(slot + at, x.to(slot.dtype.element_ty), mask=inside)
    else:
        if BLOCK < COLUMNS:
            x = tl.where(inside, x, 0.0)
        scale = tl.max(tl.abs(x), axis=1)
        tl.store(scales + row, scale, mask=there)
        x *= (1.0 / tl.maximum(scale, 1.1754944e-38))[:, None]  # the smallest whose inverse is a number
        if KIND == "fp8":
            x = tl.minimum(x * 448.0, 448.0)
            x = tl.maximum(x, -448.0) if SIGNED else tl.maximum(x, 0.001953125)
            tl.store(slot + at, x.to(tl.float8e4nv), mask=inside)
        elif KIND == "int8":
            code = _signed_code(x, cells, 7) if SIGNED else _code(x, cells, 7, 1) + 1
            tl.store(slot + at, code.to(tl.uint8), mask=inside)
        else:
            sixteenths = tl.maximum(tl.ceil(x * 16 - 1.5), 0.0).to(tl.int32)
            code = _signed_code(x, cells, 3) if SIGNED else tl.minimum(sixteenths, 15)
            shift = 4 * (tl.arange(0, COLUMNS) & 1)
            pairs = tl.sum(tl.reshape(code << shift[None, :], (ROWS, COLUMNS // 2, 2)), axis=2)
            pair = tl.arange(0, COLUMNS // 2)
            where = row[:, None] * (BLOCK // 2) + pair[None, :]
            tl.store(slot + where, pairs.to(tl.uint8), mask=there[:, None] & (pair < BLOCK // 2)[None, :])


@triton.jit
def _signed_code(x, cells, DECADES: tl.constexpr):  # noqa: ANN001, ANN202
    """0 lies in the middle of the codes, -1 has none."""
    zero: tl.constexpr = (1 << DECADES) - 1
    at = _code(tl.abs(x), cells, DECADES, 0)
    return tl.where(x < 0, tl.maximum(zero - 1 - at, 0), zero + 1 + at)


@triton.jit
def _code(x, cells, DECADES: tl.constexpr, FIRST: tl.constexpr):  # noqa: ANN001, ANN202
    """How many positive numbers of the book but the least lie below the nearest to x >= 0; -1 for what is least."""
    decade = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(DECADES + 1):
        decade = tl.where(x > tl.load(cells + i), i + 1, decade)
    at = (x * _look(cells + CELLS, decade, CELLS) + _look(cells + 2 * CELLS, decade, CELLS)).to(tl.int32)
    count = (1 << (decade + FIRST)) >> 1
    return tl.maximum(tl.minimum(at, 2 * count - (1 << FIRST) - 1), count - (1 << FIRST))


@triton.jit
def _noise(at, first, key):  # noqa: ANN001, ANN202
    x = at.to(tl.uint32) + first.to(tl.uint32)
    return (mix(mix(x) ^ key.to(tl.uint32)) & 0xFFFF).to(tl.int32)
