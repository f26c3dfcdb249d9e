"""JSON schema of a recipe's config, read from the dataclasses: what editors complete and check."""

import dataclasses
import types
import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from ftlib.config.docs import meanings_of
from ftlib.config.types import defaults_of, hints_of, is_mapping, is_sequence, members

_PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string", types.NoneType: "null"}
_REFERENCE = r"^\$\{.+\}$"  # `${section.key}` may stand for any value


def json_schema(schema: type, title: str) -> dict[str, Any]:
    """The schema (draft 2020-12) of the dataclass `schema`: types, choices, defaults, meanings; no other keys."""
    definitions: dict[str, Any] = {}
    body = _section(schema, None, definitions)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return head | body | {"$defs": dict(sorted(definitions.items()))}


def _section(cls: type, default: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """An object with the fields of a dataclass; `default` is a recipe's own instance, whose values win.

    No key is demanded: each may come from another file or from the command line.
    """
    meanings, defaults = meanings_of(cls), defaults_of(cls, default)
    properties: dict[str, Any] = {}
    for name, hint in hints_of(cls).items():
        found = _value(hint, defaults[name], definitions)
        if meanings.get(name):
            found = found | {"description": meanings[name]}
        if defaults[name] is not MISSING and not dataclasses.is_dataclass(defaults[name]):
            found = found | {"default": _plain(defaults[name])}
        properties[name] = found
    doc = (cls.__doc__ or "").split("\n")[0]
    body = {"description": doc} if doc and not doc.startswith(f"{cls.__name__}(") else {}
    return body | {"type": "object", "properties": properties, "additionalProperties": False}


def _value(hint: Any, default: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    options = members(hint)
    if len(options) > 1:
        return {"anyOf": [_value(option, MISSING, definitions) for option in options]}
    if dataclasses.is_dataclass(hint):
        own = default if isinstance(default, hint) else None
        if own is not None and own != _default_of(hint):  # a recipe's own defaults: not the shared definition
            return _section(hint, own, definitions)
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # a section that holds itself ends here
            definitions[hint.__name__] = _section(hint, None, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if typing.get_origin(hint) is typing.Annotated:
        return _value(typing.get_args(hint)[0], default, definitions)
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if is_sequence(hint):
        return _sequence(hint, definitions)
    if is_mapping(hint):
        inner = (*typing.get_args(hint), Any, Any)[1]
        return {"type": ["object", "null"], "additionalProperties": _value(inner, MISSING, definitions)}
    if hint in (int, float, bool):
        return {"type": [_PLAIN[hint], "string"], "pattern": _REFERENCE}
    return {"type": _PLAIN[hint]} if hint in _PLAIN else {}


def _sequence(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and Ellipsis not in args:
        items = [_value(arg, MISSING, definitions) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(args), "maxItems": len(args)}
    return {"type": "array", "items": _value(args[0], MISSING, definitions) if args else {}}


def _default_of(cls: type) -> Any:
    """An instance with nothing set, None for a section that needs a key."""
    try:
        return cls()
    except TypeError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
