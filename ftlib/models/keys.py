"""Checkpoint keys <-> parameter names, as a table read in both directions.

A parameter that no row names keeps its Hugging Face name. A row may name a whole tensor, a part of one that the
checkpoint stores fused, or a stack of tensors that it stores one expert at a time. Every checkpoint key is used, `keep`
(carried to an export) or `drop`; anything else is an error.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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


@dataclass(frozen=True)
class Stack:
    """`ours`: for each expert `{e}` the checkpoint tensor `hf`, [experts, rows, columns]; or all of them where there
    are several, [experts, tensors, rows, columns]."""

    ours: str
    hf: tuple[str, ...]
    experts: int


Row = Rename | Part | Stack
# Flag of config.json: where its biases are.
BIASES = {
    "attention_bias": ".self_attn.", "attention_out_bias": ".o_proj.", "mlp_bias": ".mlp.", "use_bias": "_proj.",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of one family, and patterns (regular expressions) of checkpoint keys that are no parameters."""

    rows: tuple[Row, ...] = ()
    keep: tuple[str, ...] = ()  # stays in an export as it was
    drop: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)  # recomputed, never written
    prefix: str = ""  # of every key of the language model, in a checkpoint that holds more than one


@dataclass(frozen=True)
class Piece:
    """Where a parameter comes from: a checkpoint key, and its rows there (None: all); or the keys of each expert."""

    hf: str
    rows: tuple[int, int] | None = None
    experts: tuple[tuple[str, ...], ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Every checkpoint key it needs."""
        return tuple(key for expert in self.experts for key in expert) or (self.hf,)


def piece(name: str, table: Table) -> Piece:
    """The checkpoint tensor, part of one, or tensors that hold our parameter `name`."""
    for row in table.rows:
        match = re.fullmatch(re.escape(row.ours).replace(r"\{i\}", r"(?P<i>\d+)"), name)
        if match is None:
            continue
        layer, prefix = match.groupdict(), table.prefix
        if isinstance(row, Stack):
            at = [tuple(prefix + hf.format(e=e, **layer) for hf in row.hf) for e in range(row.experts)]
            return Piece(at[0][0], experts=tuple(at))
        return Piece(prefix + row.hf.format(**layer), (row.start, row.stop) if isinstance(row, Part) else None)
    return Piece(table.prefix + name)


def plan(names: Iterable[str], table: Table) -> dict[str, Piece]:
    """Parameter name -> piece, for all of `names`."""
    return {name: piece(name, table) for name in names}


def check_keys(
    pieces: dict[str, Piece],
    found: Iterable[str],
    table: Table,
    tied: bool,
    config: dict | None = None,
    where: str | None = None,
) -> list[str]:
    """Keys of a checkpoint to carry along (`keep`); raises UserError naming what is missing or unexplained, and the
    flags of `config` that asked for missing biases."""
    found = set(found)
    wanted = {key for p in pieces.values() for key in p.keys}
    head = f"{table.prefix}lm_head.weight"
    if tied:
        wanted.discard(head)
    missing = sorted(wanted - found)
    other = [key for key in sorted(found - wanted) if not any(re.fullmatch(p, key) for p in table.drop)]
    if tied:
        other = [key for key in other if key != head]
    kept = [key for key in other if any(re.fullmatch(p, key) for p in table.keep)]
    unknown = [key for key in other if key not in kept]
    lines = []
    if missing:
        lines.append(f"the checkpoint lacks {len(missing)} tensors the model needs: {_some(missing)}")
    if unknown:
        lines.append(f"the checkpoint has {len(unknown)} tensors the model has no place for: {_some(unknown)}")
    if lines:
        fix = "check that config.json belongs to these weights"
        biased = [key for key in missing if key.endswith(".bias")]
        asked = [flag for flag, part in BIASES.items() if (config or {}).get(flag) and any(part in k for k in biased)]
        if asked:
            fix += f"; {' and '.join(asked)} in it asked for biases: write false if the model has none"
        raise UserError("\n".join(lines), where=where, fix=fix)
    return kept


def _some(keys: list[str], count: int = 5) -> str:
    return ", ".join(keys[:count]) + (f" … ({len(keys) - count} more)" if len(keys) > count else "")


def from_hf(tensors: dict[str, Tensor], names: Iterable[str], table: Table) -> dict[str, Tensor]:
    """Our state dict out of a checkpoint's tensors."""
    out = {}
    for name, p in plan(names, table).items():
        if p.experts:
            stacks = [torch.stack([tensors[key] for key in expert]) for expert in p.experts]
            out[name] = torch.stack(stacks) if len(p.experts[0]) > 1 else torch.cat(stacks)
        else:
            out[name] = tensors[p.hf] if p.rows is None else tensors[p.hf][slice(*p.rows)]
    return out


def to_hf(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """A checkpoint's tensors out of our state dict: the inverse of `from_hf`."""
    return dict(hf_tensors(state, table, lambda name: state[name]))


def hf_tensors(
    names: Iterable[str], table: Table, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint key and tensor, out of our parameters `read(name)`, each asked for once and let go soon after."""
    fused: dict[str, list[tuple[int, str]]] = {}
    pieces = plan(names, table)
    for name, p in pieces.items():
        fused.setdefault(p.hf, []).append((p.rows[0] if p.rows else 0, name))
    for hf, parts in fused.items():
        experts = pieces[parts[0][1]].experts
        if not experts:
            tensors = [read(name) for _, name in sorted(parts)]
            yield hf, tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            continue
        for keys, matrices in zip(experts, read(parts[0][1]), strict=True):
            yield from zip(keys, matrices if len(keys) > 1 else matrices[None], strict=True)
