"""Positions that skip: short rows teach a model a long range."""

from dataclasses import replace

import torch

from ftlib.layers.batch import Batch


def seed_of(seed: int, step: int, row: int) -> int:
    """The seed of a row's noise in a step."""
    return ((seed * 1_000_003 + step) * 1_000_003 + row) & ((1 << 62) - 1)


def skip_positions(batch: Batch, length: int, seeds: list[int], seq_len: int | None = None) -> Batch:
    """PoSE (Zhu et al. 2023, arXiv 2309.10400) with two chunks, on the CPU: each document is cut at a random token, and
    the positions behind the cut are moved by a draw from 0 … `length` - its tokens, so that all stay below `length`.

    Row i draws from a generator seeded with seeds[i] alone, as many numbers as a row of `seq_len` tokens takes (None:
    of its own), however wide rows without packing are. Nothing else of the batch changes.
    """
    documents, sizes = batch.layout.document_ids.long(), batch.layout.lengths.long()
    positions = batch.position_ids.clone()
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        count = seq_len or positions.shape[1]
        cut, far = torch.rand(2, count + 1, generator=generator, dtype=torch.float64)
        own = documents[row] - documents[row, 0]
        first = 1 + (cut[own] * (sizes[row] - 1).clamp(min=1)).long()  # tokens before the cut, at least one
        moved = (far[own] * (length - sizes[row] + 1).clamp(min=1)).long()
        positions[row] += torch.where(positions[row] >= first, moved, 0)
    return replace(batch, position_ids=positions)
