"""Bring into a copy what has changed in the shipped version since it was made, and keep your edits.

    tune update my.py
    tune update my.py --dry-run        show what would change

A merge of three texts: the original that `tune cp` kept as `.NAME.orig`, your copy, the version that ships now. Where
both sides changed the same lines, both are written between <<<<<<< and >>>>>>> for you to choose; the exit code is 1.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlib import __version__
from ftlib.cli import copies
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

MARKS = ("<<<<<<< yours\n", "=======\n", ">>>>>>> shipped\n")


def main(argv: Sequence[str]) -> int:
    """`tune update FILE [--dry-run]`"""
    parser = Parser("update", __doc__)
    parser.add_argument("file", metavar="FILE", help="a copy made by `tune cp`")
    parser.add_argument("--dry-run", action="store_true", help="print the changes, write nothing")
    args = parser.parse(argv)
    copy = copies.read(Path(args.file))
    if any(line + "\n" in MARKS for line in copy.text.splitlines()):
        raise UserError(f"{copy.path} holds <<<<<<< of an earlier update", fix="choose between the two sides first")
    if not copy.changed:
        print(f"{copy.name} has not changed since it was copied: nothing to do")
        return 0
    if not copy.original.is_file():
        raise UserError(
            f"the original of {copy.path} is gone: without {copy.original} your edits cannot be told from ours",
            fix=f"`tune diff {copy.path}` shows both; or copy anew with `tune cp {copy.name} NEW` and edit that",
        )
    merged, conflicts = merge(copy.original.read_text(encoding="utf-8"), copy.text, copy.theirs)
    if args.dry_run:
        mine, new = copy.text.splitlines(), merged.splitlines()
        print("\n".join(difflib.unified_diff(mine, new, str(copy.path), "updated", lineterm="")))
    else:
        copies.write(copy.path, copy.name, merged)
        print(f"{copy.path}: ftlib {copy.version} -> {__version__}")
    if conflicts:
        print(f"{conflicts} place{'s' * (conflicts > 1)} where both sides changed the same lines: look for <<<<<<<")
    return 1 if conflicts else 0


def merge(base: str, mine: str, theirs: str) -> tuple[str, int]:
    """The text with both sides' changes to `base`, and the number of places where they contradict each other."""
    texts = [text.splitlines(keepends=True) for text in (base, mine, theirs)]
    out, conflicts = [], 0
    at = [0, 0, 0]
    for starts, length in _common(*texts):
        b, m, t = (text[i:j] for text, i, j in zip(texts, at, starts, strict=True))
        chosen = _choose(b, m, t)
        if chosen is None:
            conflicts += 1
            chosen = [MARKS[0], *_ended(m), MARKS[1], *_ended(t), MARKS[2]]
        out += chosen + texts[0][starts[0] : starts[0] + length]
        at = [start + length for start in starts]
    return "".join(out), conflicts


def _choose(base: list[str], mine: list[str], theirs: list[str]) -> list[str] | None:
    if mine in (base, theirs):
        return theirs
    return mine if theirs == base else None


def _ended(lines: list[str]) -> list[str]:
    return [line if line.endswith("\n") else line + "\n" for line in lines]


def _common(base: list[str], mine: list[str], theirs: list[str]) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Runs of lines that all three have: ((start in each), length), in order, the last one empty and at the ends."""
    ours = difflib.SequenceMatcher(None, base, mine, autojunk=False).get_matching_blocks()
    other = difflib.SequenceMatcher(None, base, theirs, autojunk=False).get_matching_blocks()
    for b1, m, n1 in ours:
        for b2, t, n2 in other:
            start, stop = max(b1, b2), min(b1 + n1, b2 + n2)
            if start < stop:
                yield (start, m + start - b1, t + start - b2), stop - start
    yield (len(base), len(mine), len(theirs)), 0
