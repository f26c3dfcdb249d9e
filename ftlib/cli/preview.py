"""Show rows as a run would train on them: rendered by the chat template, with the trained tokens marked.

    tune preview RECIPE --config FILE [key=value …] [--rows N]

On a terminal trained tokens are green, elsewhere they stand between [[ and ]]. Those that the rows give a weight other
than 1 are yellow, their weight in front: 0.5|text, or [[0.5|text]]. No weights of the model are read.
"""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ftlib import config
from ftlib.cli import recipe
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.data import Document
    from ftlib.tokenizers import Tokenizer

READ = 500  # rows of each source
COLOURS, PLAIN = ("\033[32m", "\033[33m", "\033[0m"), ("[[", "[[", "]]")  # before a weight of 1, another, and behind


def main(argv: Sequence[str]) -> int:
    """`tune preview RECIPE --config F [k=v] [--rows N]`"""
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__.strip())
        return 0
    count, argv = take_number(argv, "preview", "--rows", 3)
    if not argv or argv[0].startswith("-"):
        raise UserError("tune preview: the recipe comes first", fix="tune preview RECIPE --config FILE [key=value …]")
    path = recipe.find(argv[0], "preview")
    cfg, places = config.read(recipe.load(path).Config, recipe.with_shipped_configs(argv[1:]))
    if not hasattr(cfg, "data") or not hasattr(cfg, "model"):
        raise UserError(f"{path}: its config has no model and data, so there is nothing to show")
    with places.told():
        _preview(cfg, count)
    return 0


def _preview(cfg: Any, count: int) -> None:
    from ftlib import build, data  # imports torch

    tokenizer = build.tokenizer(cfg)
    if hasattr(cfg, "rollout"):
        print("\n".join(prompts(cfg, tokenizer, count)))
        return
    asked = build.wanted(cfg)
    rows = data.load(_beginning(cfg.data), tokenizer, seed=getattr(cfg, "seed", 0), wanted=asked)
    train = rows.train if asked.kind == "train" else data.Preferences(rows.train)
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for i in range(min(count, len(train))):
        for document in train.shown(i):
            print("\n".join(show(document, tokenizer, COLOURS if colours else PLAIN)))
    print("\n".join(rows.report.lines()))
    print(f"These are the first {READ} rows of each source, and nothing is held out; a run reads all of them.")


def show(document: "Document", tokenizer: "Tokenizer", marks: tuple[str, str, str]) -> Iterator[str]:
    """A document as text, what is trained between `marks`, after a line that counts."""
    ids = [int(i) for i in document.input_ids]
    # Labels are shifted: the token at t + 1 is trained where position t has a label.
    own = document.labels != -100 if document.weights is None else document.weights
    weights = [0.0, *(float(weight) for weight in own[:-1])]
    counts = Counter(weight for weight in weights if weight)
    others = [f"{counts[weight]} of them with weight {weight:.6g}" for weight in sorted(counts) if weight != 1]
    yield ", ".join([f"--- {document.source}: {len(ids)} tokens, {sum(counts.values())} trained", *others])
    plain, other, end = marks
    text = ""
    for weight, run in groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1]):
        part = tokenizer.decode([i for i, _ in run])
        begin = plain if weight == 1 else f"{other}{weight:.6g}|"
        text += f"{begin}{part}{end}" if weight else part
    yield text


def prompts(cfg: Any, tokenizer: "Tokenizer", count: int) -> Iterator[str]:
    """The first prompts of a run that writes its own answers, as the model gets them, and what rewards see of each."""
    from ftlib.rl import setup

    sets = setup.load_prompts(dataclasses.replace(cfg, data=_beginning(cfg.data)), tokenizer)
    for prompt in [one for source in sets.train.sources for one in source][:count]:
        yield f"--- {prompt.where}: {len(prompt.ids)} tokens, none trained; for rewards: {prompt.columns}"
        yield tokenizer.decode(prompt.ids)
    yield from sets.report


def _beginning(data: Any) -> Any:
    """The same data section, its sources cut to their first rows unless they are cut already; nothing is held out."""
    splits = [s.split or "" for s in data.sources]
    splits = [split if "[" in split else f"{split}[:{READ}]" for split in splits]
    cut = [dataclasses.replace(s, split=split) for s, split in zip(data.sources, splits, strict=True)]
    return dataclasses.replace(data, sources=tuple(cut), eval=None)


def take_number(argv: Sequence[str], verb: str, option: str, default: int) -> tuple[int, list[str]]:
    """Pull `--option N` out of words that otherwise belong to the recipe."""
    words, rest, value = list(argv), [], str(default)
    while words:
        word = words.pop(0)
        if word == option:
            value = words.pop(0) if words else ""
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            rest.append(word)
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"tune {verb}: {option} needs a number of at least 1, got {value!r}")
    return int(value), rest
