"""The reference of a config's keys, read from the dataclasses themselves: `tune help config`."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ftlib.config.types import defaults_of, hints_of, members, sections_in, type_name


@dataclass(frozen=True)
class KeyDoc:
    """One key of a config."""

    key: str  # dotted; the items of a list are written `data.sources[]`
    type: str
    default: str  # as it would be written in YAML, or `required`
    meaning: str  # the comment beside the field


def describe(schema: type, prefix: str = "", default: object = None) -> list[KeyDoc]:
    """Every key of the dataclass `schema`, sections opened, in the order of their definition."""
    return _describe(schema, prefix, default, {})


def _describe(schema: type, prefix: str, default: object, seen: dict[type, str]) -> list[KeyDoc]:
    docs, meanings, defaults = [], meanings_of(schema), defaults_of(schema, default)
    for name, hint in hints_of(schema).items():
        key, inner = prefix + name, sections_in(hint)
        is_section = any(dataclasses.is_dataclass(member) for member in members(hint))
        if not is_section or len(members(hint)) > 1:  # a plain section is described by its keys
            docs.append(KeyDoc(key, type_name(hint), default_text(defaults[name]), meanings.get(name, "")))
        for suffix, section in inner:
            if suffix and section in seen:
                docs.append(KeyDoc(f"{key}{suffix}", type_name(section), "", f"as {seen[section]}"))
                continue
            seen[section] = key + suffix
            value = defaults[name] if isinstance(defaults[name], section) else None
            docs += _describe(section, f"{key}{suffix}.", value, seen)
    return docs


def default_text(value: Any) -> str:
    """A default as YAML would have it."""
    if value is MISSING:
        return "required"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str | Path):
        return str(value) or "''"
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return json.dumps(value, default=str)


def meanings_of(schema: type) -> dict[str, str]:
    """Field name -> the comment above the field, then the one that ends the line of its definition, over all bases."""
    meanings: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):  # made at run time, for example in a test or a notebook
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        found = [token for token in tokens if token.type == tokenize.COMMENT]
        comments = {token.start[0]: token.string.lstrip("# ").strip() for token in found}
        alone = {token.start[0] for token in found if token.line.lstrip().startswith("#")}
        for statement in ast.parse(source).body[0].body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                first, last = statement.lineno, statement.end_lineno
                while first - 1 in alone:
                    first -= 1
                lines = [*range(first, statement.lineno), last]
                meanings[statement.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return meanings
