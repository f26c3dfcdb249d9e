"""How to write what was probably meant by a value of the wrong type: ` (write …)`, or nothing."""

import dataclasses
import re
from dataclasses import MISSING
from types import NoneType
from typing import Any, get_args

from ftlib.config.tree import Node, scalar
from ftlib.config.types import defaults_of, hints_of, is_sequence, members, type_name

_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
_COMMA = re.compile(r"-?\d+,\d+(?:e[+-]?\d+)?", re.I)
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(?:g|gb|gib)", re.I)
_THOUSANDS = re.compile(r"(\d+) ?k", re.I)


def value(hint: Any, node: Node, key: str) -> str:
    """For a value that fits no alternative of `hint`."""
    kinds, given = members(hint), node.value
    if isinstance(given, list) and dict[str, float] in kinds:
        return f" (write {{{', '.join(f'{item.value}: 1' for item in given)}}})"
    if sections := [kind for kind in kinds if dataclasses.is_dataclass(kind)]:
        return " (write null)" if given is False and NoneType in kinds else section(sections[0], given, key)
    sequences = [kind for kind in kinds if is_sequence(kind)]
    meant = _number(given, float not in kinds) if float in kinds or int in kinds else None
    if bool in kinds and str(given).lower() in ("yes", "on", "no", "off"):
        meant = "true" if given.lower() in ("yes", "on") else "false"
    elif meant is None and sequences and isinstance(given, str | dict):
        return _items(sequences[0], given, key)
    elif meant is None and any(type_name(kind).startswith(("text", "path")) for kind in kinds) and node.text:
        meant = f"'{node.text}', in quotes"
    return f" (write {meant})" if meant else ""


def section(cls: type, given: object, key: str = "") -> str:
    """For what stands in place of a section: its one key that is required or could be meant, or all their names."""
    meant = [name for name, default in defaults_of(cls).items() if default is MISSING]
    if given is None and key:
        return f" (leave it out, or on the command line write ~{key}, for its defaults)"
    if given is True and not meant:
        return f" (write {{}} for its defaults; its keys: {', '.join(defaults_of(cls))})"
    if len(meant) != 1:
        meant = [name for name, hint in hints_of(cls).items() if any(given in get_args(kind) for kind in members(hint))]
    if isinstance(given, str) and given and len(meant) == 1:
        return f" (write {{{meant[0]}: {given}}})"
    return f" (its keys: {', '.join(defaults_of(cls))})"


def _number(given: object, whole: bool) -> str | None:
    if whole and isinstance(given, float) and given.is_integer():
        return str(int(given))
    if not isinstance(given, str):
        return None
    if not whole and (share := _SHARE.fullmatch(given)):
        return f"{float(share[1]) / 100:g}"
    if _GROUPED.fullmatch(given):
        return given.replace(",", "")
    if not whole and _COMMA.fullmatch(given):
        return given.replace(",", ".")
    if (plain := given.replace("\N{MINUS SIGN}", "-")) != given and not isinstance(scalar(plain), str):
        return plain
    if gibibytes := _BYTES.fullmatch(given):
        return gibibytes[1]
    if thousands := _THOUSANDS.fullmatch(given):
        return f"{int(thousands[1]) * 1000} or {int(thousands[1]) * 1024}"
    return None


def _items(kind: Any, given: str | dict, key: str) -> str:
    """For one thing where a list of things is expected."""
    if isinstance(given, dict):
        numbered = given and all(type(scalar(name)) is int for name in given)
        return f" (an item is named {key}[{next(iter(given))}])" if numbered else " (put it into a list: [{…}])"
    item = (kind.__args__ if hasattr(kind, "__args__") else (Any,))[0]
    if dataclasses.is_dataclass(item):
        return section(item, given).replace("{", "[{").replace("}", "}]")
    return f" (write [{given}])"
