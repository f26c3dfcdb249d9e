"""Explain a verb, or every key of a config.

    tune help VERB
    tune help config              the sections that recipes share
    tune help config RECIPE       every key of one recipe
"""

import importlib
import inspect
import shutil
import textwrap
from collections.abc import Sequence

from ftlib import cli
from ftlib.errors import UserError, did_you_mean


def main(argv: Sequence[str]) -> int:
    """`tune help [VERB | config [RECIPE]]`"""
    if not argv:
        print(cli.overview())
    elif argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif argv[0] == "config" and len(argv) <= 2:
        print(_recipe(argv[1]) if len(argv) == 2 else _sections())
    elif argv[0] in cli.VERBS and len(argv) == 1:
        importlib.import_module(f"ftlib.cli.{argv[0]}").main(["--help"])
    else:
        topics = [*cli.VERBS, "config"]
        raise UserError(f"tune help: unknown topic {' '.join(argv)!r}{did_you_mean(argv[0], topics)}",
                        fix=f"one of {', '.join(topics)}")
    return 0


def _recipe(name: str) -> str:
    from ftlib.cli import recipe
    from ftlib.config import describe

    return _table(describe(recipe.load(recipe.find(name)).Config))


def _sections() -> str:
    from ftlib import sections
    from ftlib.config import describe
    from ftlib.config.types import hints_of, sections_in

    parts, everything = [], [getattr(sections, name) for name in sections.__all__]
    nested = {inner for section in everything for hint in hints_of(section).values() for _, inner in sections_in(hint)}
    for section in everything:
        if section in nested:
            continue
        name = section.__name__
        doc = inspect.getdoc(section).split("\n")[0]
        parts.append(f"{name.lower()}: {doc}\n{_table(describe(section, f'{name.lower()}.'))}")
    last = "A recipe picks sections and adds keys of its own: tune help config RECIPE"
    return "\n\n".join([*parts, last])


def _table(docs: list) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = []
    for doc in docs:
        lines.append(f"  {doc.key:<26} {doc.type}" + (f" = {doc.default}" if doc.default else ""))
        lines += textwrap.wrap(doc.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
