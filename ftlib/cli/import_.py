"""Turn a config of Axolotl, torchtune, TRL or LLaMA-Factory into one of ours, naming each key without an equivalent.

    tune import their.yaml [--out mine.yaml]

The library is told from the keys. Nothing that the file names is imported or run. Key by key: configs/README.md.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ftlib.cli import assets
from ftlib.cli.arguments import Parser
from ftlib.config.imports import LIBRARIES, Imported, Library
from ftlib.config.imports.rules import convert
from ftlib.config.tree import Source, YamlError, parse, plain
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune import FILE [--out FILE] [--from LIBRARY] [--force]`"""
    parser = Parser("import", __doc__)
    parser.add_argument("file", metavar="FILE", help="a YAML of another library")
    parser.add_argument("--out", metavar="FILE", help="default: imported_<name>.yaml in this folder")
    parser.add_argument("--from", dest="library", choices=LIBRARIES, help="default: told from the keys")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    args = parser.parse(argv)
    path = Path(os.path.expanduser(args.file))
    out = Path(os.path.expanduser(args.out or f"imported_{path.stem}.yaml"))
    theirs = _read(path)
    library = LIBRARIES[args.library] if args.library else _tell(theirs, path)
    if out.exists() and not args.force:
        raise UserError(f"{out} exists and stays as it is", fix="name another file with --out, or add --force")
    made = convert(library, theirs | {"__folder__": str(path.parent)}, _known)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text(made, library, path, out), encoding="utf-8")
    print(f"{library.name} -> {out}, for recipes/{made.recipe}.py")
    for key, why in made.lost:
        print(f"  without an equivalent: {key}: {why}")
    for key, why in made.held:
        print(f"  needs no key here: {key}: {why}")
    for note in made.notes:
        print(f"  note: {note}")
    print(f"next:\n  tune validate recipes/{made.recipe}.py --config {out}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    """The file's keys; sections of torchtune's kind are opened into dotted keys."""
    if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".txt"):
        fix = f"tune init {path} writes a config for rows, tune doctor {path} looks at them"
        raise UserError(f"{path}: is no config but a file of rows", fix=fix)
    try:
        node = parse(path.read_text(encoding="utf-8"), Source(str(path), path.parent))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    except YamlError as error:
        raise UserError(str(error)) from None
    content = plain(node)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is made of `key: value` lines")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        opened = isinstance(value, dict) and ("_component_" in value or key in ("checkpointer", "tokenizer"))
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if opened else {key: value}
    return _filled(flat)


def _filled(flat: dict[str, Any]) -> dict[str, Any]:
    """`${key}` of torchtune's files replaced by the value of that key."""
    for key, value in flat.items():
        if isinstance(value, str):
            for name, other in flat.items():
                if isinstance(other, str | int | float) and f"${{{name}}}" in value:
                    value = value.replace(f"${{{name}}}", str(other))
            flat[key] = value
    return flat


def _tell(theirs: dict[str, Any], path: Path) -> Library:
    for library in LIBRARIES.values():
        if any(mark in theirs for mark in library.marks):
            return library
    if {"model", "data"} <= theirs.keys():
        raise UserError(f"{path} looks like a config of ours", fix=f"tune validate RECIPE --config {path}")
    marks = "; ".join(f"{library.name} has {' or '.join(library.marks)}" for library in LIBRARIES.values())
    raise UserError(f"{path}: of no library that is known here ({marks})", fix="name it with --from")


def _known(recipe: str) -> list[str]:
    from ftlib.cli import recipe as recipes
    from ftlib.config.types import known_keys

    return known_keys(recipes.load(assets.resolve_recipe(recipe)).Config)


def text(made: Imported, library: Library, path: Path, out: Path) -> str:
    """The YAML: what was imported, and as comments what was not."""
    config = _moved(made.config, path.parent, out.parent)
    body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
    head = [assets.schema_line(made.recipe), f"# from {path.name} ({library.name}), for recipes/{made.recipe}.py"]
    tail = [f"# without an equivalent: {key}: {why}" for key, why in made.lost]
    return "\n".join([*head, body.rstrip(), *tail]) + "\n"


def _moved(config: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Paths are read from the YAML's folder here, from the working directory there: local ones are made to fit."""
    places = [config.get(section) or {} for section in ("model", "tokenizer", "lora")]
    data = config.get("data", {})
    places += [*data.get("sources", []), *(data["eval"] if isinstance(data.get("eval"), list) else [])]
    for place in places:
        for key in ("path", "start_from"):
            name = place.get(key)
            if isinstance(name, str) and (found := _local(name, old)):
                relative = os.path.relpath(found, new.resolve())
                place[key] = name if os.path.isabs(name) else relative if "/" in relative else f"./{relative}"
    return config


def _local(name: str, folder: Path) -> Path | None:
    name = os.path.expanduser(name)
    return next((p.resolve() for p in (Path(name), folder / name) if p.exists()), None)
