"""What the annotations of a config mean: their names, the keys below them, and the paths that some of them mark."""

import dataclasses
import os
import re
import types
import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal

LocalOrHub = Annotated[str, "local path or hub id"]
"""A folder, a file, a Hub id `org/name[@revision]`, or `ftlib:…` for what ships with the package."""
MaybeFile = Annotated[str, "name or file"]
"""A name, or a file when it looks like one: `./x`, `x.jinja`, `x.py`, `x.py:name`."""
OutputDir = Annotated[Path, "relative to the working directory"]
"""A folder that is written to. Its relative form starts from the working directory even when a shared YAML sets it."""

_ADDRESS = re.compile(r"[A-Za-z][\w+.\-]*:/")  # of a Path `s3://x` keeps one slash
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+(?:@[\w.\-/]+)?")
_DATA_FILE = re.compile(r"\.(?:jsonl?|parquet|csv|tsv|txt|arrow|model|tiktoken|safetensors)(?:\.gz|\.zst)?$")
_NAMES = {
    int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", types.NoneType: "null",
    LocalOrHub: "path or Hub id", MaybeFile: "text", OutputDir: "path", Any: "anything", tuple: "list", list: "list",
    dict: "mapping",
}  # fmt: skip


def members(hint: Any) -> tuple:
    """The alternatives of a union; any other type is its own only alternative."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_sequence(hint: Any) -> bool:
    """Whether the annotation is a tuple or a list."""
    return (typing.get_origin(hint) or hint) in (tuple, list)


def is_mapping(hint: Any) -> bool:
    """Whether the annotation is a dict with free keys."""
    return (typing.get_origin(hint) or hint) is dict


def type_name(hint: Any) -> str:
    """What a value of this type is called in messages and in the key reference."""
    args = typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if len(members(hint)) > 1:
        return " or ".join(type_name(member) for member in args)
    if typing.get_origin(hint) is Annotated:
        return type_name(args[0])
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in args)
    if is_sequence(hint):
        if typing.get_origin(hint) is tuple and Ellipsis not in args:
            return f"list of {len(args)} ({', '.join(map(type_name, args))})"
        return f"list of {type_name(args[0])}{'s' if dataclasses.is_dataclass(args[0]) else ''}"
    if is_mapping(hint):
        return f"mapping to {type_name(args[1])}"
    return f"{hint.__name__} section" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def hints_of(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass, markers included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def defaults_of(cls: type, instance: object = None) -> dict[str, Any]:
    """Field name -> default (MISSING when required); those of `instance` when one is given."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if instance is not None:
        return {field.name: getattr(instance, field.name) for field in fields}
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields}


def sections_in(hint: Any) -> list[tuple[str, type]]:
    """The sections that a value of this type can hold, each with what its keys carry: nothing, or `[]` in a list."""
    found = []
    for member in members(hint):
        args = typing.get_args(member)
        if dataclasses.is_dataclass(member):
            found.append(("", member))
        elif is_sequence(member) and args and dataclasses.is_dataclass(args[0]):
            found.append(("[]", args[0]))
    return found


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections included; the items of a list are written `sources[]`."""
    keys = []
    for name, hint in hints_of(schema).items():
        keys.append(prefix + name)
        for suffix, section in sections_in(hint):
            keys += known_keys(section, f"{prefix}{name}{suffix}.")
    return keys


def resolve_path(hint: Any, value: str, base: Path) -> str | Path:
    """What a path, or a text marked as one, means when it was written in the folder `base`."""
    if hint == OutputDir:
        return Path(os.path.expanduser(value))
    if hint is Path:
        return Path(_against(base, value))
    if hint == MaybeFile:
        match = re.fullmatch(r"(.+\.py)(:\w+)", value)
        file, name = match.groups() if match else (value, "")
        is_file = file.startswith(("./", "../", "~", "/")) or file.endswith((".jinja", ".py"))
        return _against(base, file) + name if is_file else value
    if hint == LocalOrHub and value and "://" not in value and not value.startswith("ftlib:"):
        is_local = value.startswith(("./", "../", "~", "/")) or value in (".", "..") or (base / value).exists()
        is_local = is_local or _DATA_FILE.search(value) or ("/" in value and not _HUB_ID.fullmatch(value))
        return _against(base, value) if is_local else value
    return value


def no_folder(output_dir: str | Path) -> str | None:
    """Why nothing can be written to an `output_dir`, and what to do: None where it is no address such as `s3://x`."""
    if not _ADDRESS.match(str(output_dir)):
        return None
    how = "name a folder, and copy it there when the run is over (`aws s3 sync`, `rclone`), or mount the storage"
    return f"{output_dir} is an address, and a run writes files: {how}"


def _against(base: Path, value: str) -> str:
    return os.path.abspath(base / os.path.expanduser(value))
