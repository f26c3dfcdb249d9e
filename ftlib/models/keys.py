"""Checkpoint keys <-> parameter names, as a table read in both directions.

A parameter that no row names keeps its Hugging Face name. A row may name a whole tensor, or a part of one that
the checkpoint stores fused. Every checkpoint key is used, `keep` (carried to an export) or `drop`; anything else is
an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftlib.errors import UserError


@dataclass(frozen=True)
class Rename:
    """`ours` is the checkpoint tensor `hf`. `{i}` in both stands for the layer."""

    ours: str
    hf: str


@dataclass(frozen=True)
class Part:
    """`ours` is rows [start, stop) of the fused checkpoint tensor `hf`."""

    ours: str
    hf: str
    start: int
    stop: int


Row = Rename | Part


@dataclass(frozen=True)
class Table:
    """The rows of one family, and patterns (regular expressions) of checkpoint keys that are no parameters."""

    rows: tuple[Row, ...] = ()
    keep: tuple[str, ...] = ()  # stays in an export as it was
    drop: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)  # recomputed, never written


@dataclass(frozen=True)
class Piece:
    """Where a parameter comes from: a checkpoint key, and its rows there (None: all)."""

    hf: str
    rows: tuple[int, int] | None = None


def _fill(pattern: str, text: str, target: str) -> str | None:
    """`target` with the layer number that makes `pattern` equal `text`, or None when nothing does."""
    match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), text)
    return target.format(**match.groupdict()) if match else None


def piece(name: str, table: Table) -> Piece:
    """The checkpoint tensor, or part of one, that holds our parameter `name`."""
    for row in table.rows:
        if (hf := _fill(row.ours, name, row.hf)) is not None:
            return Piece(hf, (row.start, row.stop) if isinstance(row, Part) else None)
    return Piece(name)


def plan(names: Iterable[str], table: Table) -> dict[str, Piece]:
    """Parameter name -> piece, for all of `names`."""
    return {name: piece(name, table) for name in names}


def check_keys(pieces: dict[str, Piece], found: Iterable[str], table: Table, tied: bool) -> list[str]:
    """Keys of a checkpoint to carry along (`keep`); raises UserError naming what is missing or unexplained."""
    found = set(found)
    wanted = {p.hf for p in pieces.values()}
    if tied:
        wanted.discard("lm_head.weight")
    missing = sorted(wanted - found)
    other = [key for key in sorted(found - wanted) if not any(re.fullmatch(p, key) for p in table.drop)]
    if tied:
        other = [key for key in other if key != "lm_head.weight"]
    kept = [key for key in other if any(re.fullmatch(p, key) for p in table.keep)]
    unknown = [key for key in other if key not in kept]
    lines = []
    if missing:
        lines.append(f"the checkpoint lacks {len(missing)} tensors the model needs: {_some(missing)}")
    if unknown:
        lines.append(f"the checkpoint has {len(unknown)} tensors the model has no place for: {_some(unknown)}")
    if lines:
        raise UserError("\n".join(lines), fix="check that config.json belongs to these weights")
    return kept


def _some(keys: list[str], count: int = 5) -> str:
    return ", ".join(keys[:count]) + (f" … ({len(keys) - count} more)" if len(keys) > count else "")


def from_hf(tensors: dict[str, Tensor], names: Iterable[str], table: Table) -> dict[str, Tensor]:
    """Our state dict out of a checkpoint's tensors."""
    out = {}
    for name, p in plan(names, table).items():
        out[name] = tensors[p.hf] if p.rows is None else tensors[p.hf][slice(*p.rows)]
    return out


def hf_layout(names: Iterable[str], table: Table) -> dict[str, list[str]]:
    """Checkpoint key -> our parameters that make it up, in the order of its rows."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, p in plan(names, table).items():
        parts.setdefault(p.hf, []).append((p.rows[0] if p.rows else 0, name))
    return {hf: [name for _, name in sorted(found)] for hf, found in parts.items()}


def join(parts: list[Tensor]) -> Tensor:
    """One checkpoint tensor out of the parameters that make it up."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def to_hf(state: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """A checkpoint's tensors out of our state dict: the inverse of `from_hf`."""
    return {hf: join([state[name] for name in names]) for hf, names in hf_layout(state, table).items()}
