"""Explain a verb, or every key of a config.

    tune help VERB
    tune help config                  the sections that recipes share
    tune help config RECIPE           every key of one recipe
    tune help config RECIPE KEY       one key, or all below it: optim.lr, optim, lr
    tune help KEY [RECIPE]            the same of all recipes that ship, where it differs of each
    tune help schema RECIPE           the JSON schema of its config, for editors
"""

import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Sequence

from ftlib import cli
from ftlib.errors import UserError, did_you_mean


def main(argv: Sequence[str]) -> int:
    """`tune help [VERB | config [RECIPE [KEY]] | schema RECIPE | KEY [RECIPE]]`"""
    if not argv:
        print(cli.overview())
    elif argv[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif argv[0] == "config" and len(argv) <= 3:
        print(_recipe(*argv[1:]) if len(argv) > 1 else _sections())
    elif argv[0] == "schema" and len(argv) == 2:
        print(json.dumps(schema_of(argv[1]), indent=1, ensure_ascii=False))
    elif argv[0] in cli.VERBS and len(argv) == 1:
        cli.module(argv[0]).main(["--help"])
    elif "." in argv[0] and len(argv) <= 2:
        print(_recipe(argv[1], argv[0]) if len(argv) == 2 else _key(argv[0]))
    elif len(argv) == 1 and argv[0] in _words():
        print(_key(argv[0]))
    elif len(argv) == 1 and argv[0] == "schema":
        raise UserError("tune help schema: of which recipe?", fix="tune help schema lora_sft")
    else:
        topics = [*cli.VERBS, "config", "schema"]
        raise UserError(f"tune help: unknown topic {' '.join(argv)!r}{did_you_mean(argv[0], topics)}",
                        fix=f"one of {', '.join(topics)}, or a key: tune help optim.lr")
    return 0


def schema_of(name: str) -> dict:
    """The JSON schema of a recipe's config."""
    from ftlib.cli import recipe
    from ftlib.config.schema import json_schema

    path = recipe.find(name)
    return json_schema(recipe.load(path).Config, f"config of recipes/{path.name}")


def _recipe(name: str, key: str | None = None) -> str:
    docs = _docs(name)
    if key is None:
        return _table(docs)
    if not (found := _of_key(docs, key)):
        raise UserError(f"{key}: {_unknown(key, docs)}", fix=f"tune help config {name}")
    return _table(found)


def _key(key: str) -> str:
    """A key, or all below it, in the recipes that have it: once where they agree."""
    from ftlib.cli import assets

    docs = {path.stem: _docs(path.stem) for path in assets.shipped("recipes").values()}
    tables: dict[str, list[str]] = {}
    for name, every in docs.items():
        if found := _of_key(every, key):
            tables.setdefault(_table(found), []).append(name)
    if not tables:
        everything = {doc.key: doc for every in docs.values() for doc in every}
        raise UserError(f"{key}: {_unknown(key, list(everything.values()))}", fix="tune help config RECIPE")
    return "\n\n".join(f"{', '.join(names)}:\n{table}" for table, names in tables.items())


def _words() -> set[str]:
    """Keys and sections of the recipes that ship, without what is below them."""
    from ftlib.cli import assets

    keys = [doc.key for path in assets.shipped("recipes").values() for doc in _docs(path.stem)]
    return {key.partition(".")[0].removesuffix("[]") for key in keys}


def _docs(name: str) -> list["KeyDoc"]:  # noqa: F821
    from ftlib.cli import recipe
    from ftlib.config import describe

    return describe(recipe.load(recipe.find(name)).Config)


def _of_key(docs: list["KeyDoc"], key: str) -> list["KeyDoc"]:  # noqa: F821
    """The key and all below it, else every key that ends so."""
    wanted = re.sub(r"\[\d*\]", "[]", key)
    found = [doc for doc in docs if doc.key == wanted or doc.key.startswith((f"{wanted}.", f"{wanted}[]."))]
    return found or [doc for doc in docs if doc.key.rpartition(".")[2] == wanted]


def _unknown(key: str, docs: list["KeyDoc"]) -> str:  # noqa: F821
    from ftlib.config.suggest import unknown_key

    known = [doc.key for doc in docs]
    sections = dict.fromkeys(name.partition(".")[0] for name in known)
    return unknown_key(key, [*known, *sections], sections)


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
