"""Rows whose answers are better and worse, good and bad, or right and wrong step by step -> tokens.

A pair is stored as one document, prompt, chosen answer, rejected answer, so that it is cached, held out and counted
like any other; `Unit` says where the pieces are (ftlib.data.preference_batch puts them into rows).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlib.data import thinking
from ftlib.data.examples import Example, shown
from ftlib.data.masks import Masked, Tokenizer, tokenize
from ftlib.errors import UserError
from ftlib.sections import Data

KINDS: dict[str, tuple[str, ...]] = {  # what a recipe asks for -> the kinds of formats that give it
    "train": ("train",),
    "pairs": ("preference",),
    "rated": ("unpaired", "preference"),
    "steps": ("stepwise",),
}
_PAIR, _LABELLED = ("chosen", "rejected"), ("completion", "label")
NEEDS = {"pairs": (_PAIR,), "rated": (_LABELLED, _PAIR), "steps": (("completions", "labels"),)}
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"))
BOTH = "both answers, each behind its prompt"
EMPTY, EQUAL = "an answer has no trained token", "chosen and rejected are the same"


@dataclass(frozen=True)
class Unit:
    """`ids` int32 and `trained` bool, both [n]: `prompt` tokens, then `first` tokens of an answer, then those of the
    second one of a pair. `value`: the margin of a pair, 1 or 0 of an answer that is good or bad. Of steps: `prompt`
    tokens of text, trained where a step ends, then the class of each of these ends."""

    ids: np.ndarray
    trained: np.ndarray
    prompt: int
    first: int = 0
    value: float = 0.0

    @property
    def size(self) -> int:
        """`sizes` of it alone."""
        return int(sizes(len(self.ids), np.array(self.pieces)))

    @property
    def pieces(self) -> tuple[float, float, float]:
        """What is kept beside the tokens."""
        return float(self.prompt), float(self.first), self.value


@dataclass(frozen=True)
class Wanted:
    """What a recipe makes of a row: documents to imitate (`train`), `pairs` of answers, `rated` single ones, or
    `steps`, each of which the one token that is `separator` ends; `last_only` looks at the last step alone."""

    kind: str = "train"
    separator: str = "\n"
    last_only: bool = False


def sizes(lengths: np.ndarray | int, pieces: np.ndarray) -> np.ndarray:
    """Tokens that units take in a row, int64 [n], where every answer stands behind its own copy of the prompt: what
    `data.seq_len` is compared with. `lengths` [n] are those of their `ids`, `pieces` [n, 3] as `Unit.pieces`."""
    prompts, firsts = pieces[..., 0].astype(np.int64), pieces[..., 1].astype(np.int64)
    seconds = np.where(firsts > 0, lengths - prompts - firsts, 0)
    return prompts + firsts + np.where(seconds > 0, prompts + seconds, 0)


def units(example: Example, tokenizer: Tokenizer, cfg: Data, wanted: Wanted) -> Iterator[Unit | str]:
    """What one record gives; a text says why a part of it is left out. UserError for a broken record."""
    record = example.record or {}
    if not any(set(keys) <= record.keys() for keys in NEEDS[wanted.kind]):
        needs = ", or ".join(" and ".join(keys) for keys in NEEDS[wanted.kind])
        raise UserError(f"the row gives no {needs}", where=example.where)
    if wanted.kind == "steps":
        yield _steps(example, tokenizer, cfg, wanted)
    elif wanted.kind == "pairs":
        chosen, rejected = (_answered(example, record[key], tokenizer, cfg) for key in _PAIR)
        yield _pair(chosen, rejected, _margin(example))
    elif "label" in record:
        yield _rated(_answered(example, record["completion"], tokenizer, cfg), float(record["label"]))
    else:  # a pair is a good answer and a bad one
        for key, good in zip(_PAIR, (1.0, 0.0), strict=True):
            yield _rated(_answered(example, record[key], tokenizer, cfg), good)


def fit(unit: Unit, cfg: Data, where: str) -> tuple[Unit | str, str | None]:
    """The unit as it fits a row, or why it does not, and how it was changed. Only the beginning of a prompt is ever cut
    off, so that no answer loses its end."""
    size, copies = unit.size, 2 if unit.size > len(unit.ids) else 1
    copies_of_prompt = f" ({BOTH})" if copies == 2 else ""
    if size <= cfg.seq_len:
        return unit, None
    if cfg.overlong == "error":
        what = f"{size:,} tokens{copies_of_prompt} are more than"
        fix = "raise data.seq_len, or set data.overlong to drop or truncate"
        raise UserError(f"{what} data.seq_len={cfg.seq_len:,}", where=where, fix=fix)
    cut = -(-(size - cfg.seq_len) // copies)
    if cfg.overlong == "drop" or not unit.first or cut >= unit.prompt:
        return f"longer than data.seq_len={cfg.seq_len:,} tokens{copies_of_prompt}", None
    shorter = replace(unit, ids=unit.ids[cut:], trained=unit.trained[cut:], prompt=unit.prompt - cut)
    return shorter, f"beginning of the prompt cut off at data.seq_len={cfg.seq_len:,} tokens"


def _answered(example: Example, answer: list[dict[str, Any]], tokenizer: Tokenizer, cfg: Data) -> Masked:
    """Tokens of the prompt with an answer behind it, trained where the answer was written by a trained role."""
    whole = replace(example, messages=[dict(m) for m in example.messages], trained=[False] * len(example.messages))
    for message in answer:
        whole.add(**message)
    thinking.apply(whole, cfg.thinking)
    masked = tokenize(whole, tokenizer, cfg.train_on_end)
    example.unwritten += whole.unwritten
    return masked


def _pair(chosen: Masked, rejected: Masked, margin: float) -> Unit | str:
    (a, trained_a), (b, trained_b) = chosen, rejected
    if not (trained_a[1:].any() and trained_b[1:].any()):
        return EMPTY
    if np.array_equal(a, b):
        return EQUAL
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    common = int(differ[0]) if len(differ) else shorter
    prompt = min(common, int(trained_a.argmax()), int(trained_b.argmax()))
    ids, trained = np.append(a, b[prompt:]), np.append(trained_a, trained_b[prompt:])
    return Unit(ids, trained, prompt, len(a) - prompt, margin)


def _rated(answer: Masked, good: float) -> Unit | str:
    ids, trained = answer
    prompt = int(trained.argmax())
    return Unit(ids, trained, prompt, len(ids) - prompt, good) if trained[1:].any() else EMPTY


def _steps(example: Example, tokenizer: Tokenizer, cfg: Data, wanted: Wanted) -> Unit | str:
    """The prompt, then each step and the separator behind it. Steps are tokenised alone, so that nothing merges with
    the separator's token; a step that holds it is left out, as nobody could tell where it ends."""
    steps, labels = example.record["completions"], example.record["labels"]
    if not all(isinstance(step, str) for step in steps) or any(label not in (0, 1) for label in labels):
        what = f"steps must be text and labels true or false, here: {shown(steps)} {shown(labels)}"
        raise UserError(what, where=example.where)
    end = separator_id(tokenizer, wanted.separator)
    ids, at = tokenizer.apply_chat_template(example.messages, tools=example.tools, add_generation_prompt=True), []
    for step in steps:
        tokens = tokenizer.encode(step, special=False)
        if end in tokens:
            return "a step holds the separator"
        at.append(len(ids) + len(tokens))
        ids = [*ids, *tokens, end]
    if wanted.last_only:
        at, labels = at[-1:], labels[-1:]
    if not at:
        return "no step"
    trained = np.zeros(len(ids) + len(labels), bool)
    trained[at] = True
    return Unit(np.array([*ids, *map(int, labels)], np.int32), trained, len(ids))


def separator_id(tokenizer: Tokenizer, separator: str) -> int:
    """The one token that a separator is. UserError if it is more than one."""
    ids = tokenizer.encode(separator)
    if len(ids) != 1:
        what = f"the separator {separator!r} is {len(ids)} tokens of this tokenizer"
        raise UserError(what, where="reward.separator", fix="take one that is a single token, such as '\\n'")
    return ids[0]


def _margin(example: Example) -> float:
    """How much better the chosen answer is, from a column `margin` or two of scores; 0 where there is none."""
    extra = example.extra
    values = [extra["margin"]] if "margin" in extra else [0.0]
    for better, worse in SCORES:
        if better in extra and worse in extra:
            values = [extra[better], extra[worse]]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise UserError(f"margins and scores must be numbers, here: {shown(values)}", where=example.where)
    return float(values[0] - sum(values[1:]))
