"""`draw` in one pass over the logits: parts of a row in programs of their own, then one that compares the parts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftlib.kernels.mix_triton import mix

PARTS, BLOCK = 8, 2048


def draw_triton(logits: Tensor, keys: Tensor, positions: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """As `draw` without truncation; logits [B, V] of any float dtype."""
    rows, vocab = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    scores = torch.empty(4, rows, PARTS, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, PARTS, dtype=torch.int32, device=logits.device)
    share = triton.cdiv(triton.cdiv(vocab, PARTS), BLOCK) * BLOCK
    given = (logits.contiguous(), keys.contiguous(), positions, temperature)
    _part[(rows, PARTS)](*given, scores, places, rows, vocab, share, PARTS=PARTS, BLOCK=BLOCK)
    _whole[(rows,)](scores, places, token, logprob, rows, PARTS=PARTS)
    return token, logprob


@triton.jit
def _part(  # noqa: ANN202
    logits, keys, positions, temperature, scores, places, rows, vocab, share,  # noqa: ANN001
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    low, high = tl.load(keys + 2 * row).to(tl.uint32), tl.load(keys + 2 * row + 1).to(tl.uint32)
    word = mix(low + tl.load(positions + row).to(tl.uint32) * 0x9E3779B1)
    most, best_z, best_at = -float("inf"), -float("inf"), 0  # of what is drawn: score with noise, score, token
    top, total = -float("inf"), 0.0  # of the sum of exponentials
    for start in range(part * share, tl.minimum((part + 1) * share, vocab), BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        if heat > 0:
            z = z / heat
        bits = mix(mix((at.to(tl.uint32) * 0x85EBCA6B) ^ word) ^ high)
        u = (bits.to(tl.float32) + 0.5) * 2.0**-32
        # -log(1 - u), by its series where 1 - u would lose the digits of u
        waiting = tl.where(u < 1e-3, u * (1 + u * (0.5 + u * 0.33333334)), -tl.log(tl.maximum(1 - u, 1e-30)))
        noisy = tl.where(at < vocab, z - tl.log(waiting), -float("inf"))
        if heat == 0:
            noisy = z
        here = tl.max(noisy, 0)
        if here > most:
            index = tl.argmax(noisy, 0)
            most, best_at = here, start + index
            best_z = tl.sum(tl.where(tl.arange(0, BLOCK) == index, z, 0.0), 0)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    place, plane = row * PARTS + part, rows * PARTS
    tl.store(scores + place, most)
    tl.store(scores + plane + place, best_z)
    tl.store(scores + 2 * plane + place, top)
    tl.store(scores + 3 * plane + place, total)
    tl.store(places + place, best_at)


@triton.jit
def _whole(scores, places, token, logprob, rows, PARTS: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    part, plane = tl.arange(0, PARTS), rows * PARTS
    place = row * PARTS + part
    most, z = tl.load(scores + place), tl.load(scores + plane + place)
    top, total = tl.load(scores + 2 * plane + place), tl.load(scores + 3 * plane + place)
    best = tl.argmax(most, 0)
    highest = tl.max(top, 0)
    whole = tl.sum(tl.where(total > 0, total * tl.exp(top - highest), 0.0), 0)
    chosen = tl.sum(tl.where(part == best, z, 0.0), 0)
    tl.store(token + row, tl.sum(tl.where(part == best, tl.load(places + place), 0), 0).to(tl.int64))
    tl.store(logprob + row, chosen - highest - tl.log(whole))
