"""`tune doctor` of rows that supervised training has no use for: what they are, what trains on them, their lengths."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ftlib.data import preference
from ftlib.data.doctor_findings import Findings, Row
from ftlib.data.examples import Example, Shape
from ftlib.data.formats import kind, read_examples
from ftlib.data.masks import Tokenizer
from ftlib.data.preference import Unit, Wanted
from ftlib.data.report import UNWRITTEN, counted, spread
from ftlib.data.sources import Place
from ftlib.errors import UserError
from ftlib.sections import Data, Source

USES = {
    "preference": "pairs of answers, one better than the other: they train recipes/dpo.py and recipes/reward.py",
    "unpaired": "answers that are good or bad: they train recipes/dpo.py with dpo.loss=kto",
    "stepwise": "steps with labels: they train recipes/reward.py with reward.kind=steps",
    "prompt": "prompts without answers: they train recipes/grpo.py, where the model writes the answers",
    "evaluation": "references to compare answers with: nothing trains on them",
}
_WANTED = {"preference": "pairs", "unpaired": "rated", "stepwise": "steps"}
Sizes = dict[str, list[int]]


@dataclass(frozen=True)
class _Found:
    """A row, what repeats of it have in common, what is wrong with it, and messages whose reasoning is left out."""

    row: Row
    mark: bytes = b""
    error: UserError | None = None
    unwritten: int = 0


@dataclass
class Answers(Findings):
    """Rows of one of these kinds: what they are good for, and the lengths of their parts in tokens."""

    use: str = ""
    sizes: Sizes = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each number."""
        facts = [("rows", f"{len(self.rows):,}"), ("format", self.shape), ("these are", self.use)]
        facts += [(f"tokens of a {name}", spread(sizes)) for name, sizes in self.sizes.items()]
        if self.unwritten:
            facts.append(("warning", f"the reasoning of {counted(self.unwritten, 'message')} {UNWRITTEN}"))
        facts += [(state, f"{count:,} rows") for state, count in self.states().items() if state != "ok"]
        facts.append(("exact repeats", f"{sum(bool(row.repeat_of) for row in self.rows):,} rows"))
        both = sum(row.held_out for row in self.rows)
        return [*facts, ("held out as well", f"{both:,} rows")] if both else facts


def examine(
    path: str, shape: Shape, places: Iterable[Place], held_out: Iterable[Place], tokenizer: Tokenizer, seq_len: int
) -> Findings:
    """Every row of these kinds, with those that `held_out` has too. UserError where no row can be read at all."""
    cfg = Data(sources=(Source(path=path),), seq_len=1 << 30)
    known = {one.mark for one in _read(shape, held_out, tokenizer, cfg, seq_len, {}) if one.mark}
    first_seen, sizes = {}, {}
    found = list(_read(shape, places, tokenizer, cfg, seq_len, sizes))
    for row, mark in ((one.row, one.mark) for one in found if one.mark):
        row.held_out, row.repeat_of = mark in known, first_seen.setdefault(mark, row.where)
        row.repeat_of = "" if row.repeat_of == row.where else row.repeat_of
    error = next((one.error for one in found if one.error), None)
    if error is not None and not first_seen:
        raise error
    said = {"unwritten": sum(one.unwritten for one in found), "use": USES[kind(shape.format)], "sizes": sizes}
    return Answers(path, f"{shape.format} ({shape.evidence})", [one.row for one in found], **said)


def _read(
    shape: Shape, places: Iterable[Place], tokenizer: Tokenizer, cfg: Data, seq_len: int, sizes: Sizes
) -> Iterator[_Found]:
    """Each row; lengths of its parts go into `sizes`."""
    for file, row in places:
        where = f"{file}:{row.line}"
        try:
            if isinstance(row.value, UserError):
                raise row.value
            for example in read_examples(row.value, shape, where):
                yield from _rows(example, where, kind(shape.format), tokenizer, cfg, seq_len, sizes)
        except UserError as error:
            yield _Found(Row(where, 0, 0, f"broken: {error.what}"), error=error)


def _rows(
    example: Example, where: str, of: str, tokenizer: Tokenizer, cfg: Data, seq_len: int, sizes: Sizes
) -> Iterator[_Found]:
    if of == "evaluation":
        yield _Found(Row(where, 0, 0), _mark(json.dumps(example.record, sort_keys=True, default=str).encode()))
        return
    if of == "prompt":
        ids = tokenizer.apply_chat_template(example.messages, tools=example.tools, add_generation_prompt=True)
        found = [(Unit(np.array(ids, np.int32), np.zeros(len(ids), bool), len(ids)), {"prompt": len(ids)})]
    else:
        units = list(preference.units(example, tokenizer, cfg, Wanted(_WANTED[of])))
        found = [(unit, {} if isinstance(unit, str) else _parts(unit, of)) for unit in units]
    for unit, parts in found:
        if isinstance(unit, str):
            yield _Found(Row(where, 0, 0, unit))
            continue
        for name, size in parts.items():
            sizes.setdefault(name, []).append(size)
        state = "ok" if unit.size <= seq_len else f"longer than {seq_len:,} tokens"
        count = int(unit.trained.sum())
        row = Row(where, unit.size, count, state, weight=float(count))
        yield _Found(row, _mark(unit.ids.tobytes()), unwritten=example.unwritten)


def _parts(unit: Unit, of: str) -> dict[str, int]:
    """Tokens of the pieces of a row."""
    if of == "stepwise":
        return {"text of steps": unit.prompt}
    if of == "preference":
        rest = len(unit.ids) - unit.prompt - unit.first
        return {"prompt": unit.prompt, "chosen answer": unit.first, "rejected answer": rest}
    return {"prompt": unit.prompt, f"{'good' if unit.value else 'bad'} answer": unit.first}


def _mark(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
