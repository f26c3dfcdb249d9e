"""YAML files and dotted overrides -> frozen dataclasses, with every problem reported at once.

    cfg = config.load(Config)      # --config a.yaml [--config b.yaml] [key=value …] [~key …]

Relative paths in a file start from the file's folder, those of an override from the working directory. A config is
data: reading one imports nothing, and `${a.b}` refers to other keys and to nothing else.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from ftlib.config.build import build
from ftlib.config.docs import KeyDoc, describe
from ftlib.config.layers import read_layers, split_arguments
from ftlib.config.places import Places
from ftlib.config.secrets import redact, redact_tree
from ftlib.config.suggest import NO_KEY
from ftlib.config.tree import plain, scalar
from ftlib.config.types import LocalOrHub, MaybeFile, OutputDir, defaults_of, known_keys
from ftlib.config.whose import recipes_of
from ftlib.errors import Problems

__all__ = [
    "KeyDoc", "LocalOrHub", "MaybeFile", "OutputDir", "Places", "brief", "describe", "dump", "load", "read", "redact",
    "to_dict",
]  # fmt: skip

Schema = TypeVar("Schema")


def load(schema: type[Schema], argv: Sequence[str] | None = None) -> Schema:
    """Parse a recipe's command line (by default the process's own) into an instance of the dataclass `schema`.

    Raises `ftlib.errors.Problems` with every problem found, each starting with its place: `file:line` or
    `command line: key=value`.
    """
    return read(schema, argv)[0]


def read(schema: type[Schema], argv: Sequence[str] | None = None) -> tuple[Schema, Places]:
    """As `load`, and where each key was set: `with places.told(): main(cfg)` has later errors say it too."""
    arguments = split_arguments(sys.argv[1:] if argv is None else argv)
    tree, problems = read_layers(arguments, known_keys(schema))
    cfg, found = build(schema, tree)
    problems += found
    if problems:
        problems = sorted(dict.fromkeys(problems), key=_by_line)
        if any(NO_KEY in problem for problem in found):
            problems[-1] += _whose(plain(tree), arguments.files, known_keys(schema))
        raise Problems(problems)
    return cfg, Places.of(tree)


def _whose(tree: dict, files: Sequence[str], known: Sequence[str]) -> str:
    """What to do about keys that are of other recipes, as the end of a problem; empty where no recipe has them."""
    if others := recipes_of(tree, files):
        return f"\nfix: take a recipe that has all of these keys, {' or '.join(others)}, or leave out what is none here"
    owners = {key: recipes_of({key: tree[key]}) for key in tree if key not in known}
    named = "; ".join(f"{key} ({', '.join(names)})" for key, names in owners.items() if names)
    return f"\nfix: leave out what is none here, or take a recipe that has it: {named}" if named else ""


def _by_line(problem: str) -> tuple[str, int]:
    place = re.match(r"(.+?):(\d+): ", problem)
    return (place[1], int(place[2])) if place else (problem.split(":")[0], 0)


def to_dict(cfg: object) -> dict:
    """A config as plain dicts, lists and scalars, ready for JSON or YAML."""
    return _plain(cfg)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def brief(section: object) -> str:
    """What of a section differs from its defaults, as JSON on one line: the value of an override."""
    return json.dumps(redact_tree(_different(section)), ensure_ascii=False)


def _different(value: object) -> object:
    """`_plain` without what has its default; an empty mapping is what a section makes of one that was left out."""
    if dataclasses.is_dataclass(value):
        usual, own = defaults_of(type(value)), defaults_of(type(value), value)
        return {name: _different(own[name]) for name in own if _plain(own[name]) not in ({}, _plain(usual[name]))}
    if isinstance(value, list | tuple):
        return [_different(item) for item in value]
    return _plain(value)


def dump(cfg: object) -> str:
    """A config as YAML that `load` reads back; what looks like a secret is replaced by `<redacted>`."""
    return yaml.dump(redact_tree(to_dict(cfg)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line, and quotes every text that `load` would take for something else."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if scalar(value) == value else "'")


def _lists_in_line(dumper: yaml.SafeDumper, value: list) -> yaml.Node:
    scalars = not any(isinstance(item, dict | list) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=scalars)


_Dumper.add_representer(list, _lists_in_line)
_Dumper.add_representer(str, _text)
