"""A tree of values -> frozen dataclasses. Every problem is collected, none ends the walk."""

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ftlib.config import advice
from ftlib.config.secrets import redact
from ftlib.config.suggest import other_key, unknown_key
from ftlib.config.tree import Node
from ftlib.config.types import (
    LocalOrHub,
    OutputDir,
    defaults_of,
    hints_of,
    is_mapping,
    is_sequence,
    known_keys,
    members,
    no_folder,
    resolve_path,
    type_name,
)
from ftlib.errors import UserError, did_you_mean

FAILED = object()  # what stands for a value that has been complained about
BROKEN = "\0broken"  # the value of a node that was complained about before the build


@dataclass
class Report:
    """What every step of one build shares: the keys there are, and the problems so far."""

    known: list[str]
    problems: list[str] = field(default_factory=list)

    def add(self, node: Node, key: str, message: str) -> object:
        """Note a problem; the result stands for the value that could not be built."""
        self.problems.append(f"{node.where}: {key}: {message}" if key else f"{node.where}: {message}")
        return FAILED


def build(schema: type, tree: Node) -> tuple[Any, list[str]]:
    """An instance of the dataclass `schema` (None if there are problems) and every problem, as `where: key: what`."""
    report = Report(known_keys(schema))
    value = _section(schema, tree, "", report, None)
    return (None if value is FAILED else value), report.problems


def _value(hint: Any, node: Node, key: str, report: Report, default: Any = MISSING) -> Any:
    if node.value == BROKEN:
        return FAILED
    if node.value == "???":
        return report.add(node, key, "has to be set, it is still '???'")
    if node.value is None and default is None:
        return None  # a null where null is the default needs no `| None`
    if len(members(hint)) > 1:
        return _union(hint, node, key, report, default)
    if dataclasses.is_dataclass(hint):
        return _section(hint, node, key, report, default if isinstance(default, hint) else None)
    if typing.get_origin(hint) is Literal:
        return _literal(typing.get_args(hint), node, key, report)
    if is_sequence(hint):
        return _sequence(hint, node, key, report, default)
    if is_mapping(hint):
        return _mapping(hint, node, key, report)
    return _scalar(hint, node, key, report)


def _scalar(hint: Any, node: Node, key: str, report: Report) -> Any:
    value = node.value
    if hint is float and type(value) in (int, float) and value == value:
        return float(value)
    if hint in (int, bool, types.NoneType) and type(value) is hint:
        return value
    if hint is Any:
        return value
    if hint not in (int, float, bool, types.NoneType):  # text and paths, marked or not
        if node.shell and node.text and value is not None:
            value = node.text  # a shell eats the quotes that would say that 007 is text
        if value == "" and hint in (Path, LocalOrHub, OutputDir):
            return report.add(node, key, "an empty text is no path")
        if hint == OutputDir and (why := no_folder(value)):
            return report.add(node, key, why)
        if isinstance(value, str):
            try:
                return resolve_path(hint, value, node.base)
            except OSError as error:
                return report.add(node, key, f"{value[:60]!r}… cannot be a path: {error.strerror}")
    return _mismatch(hint, node, key, report)


def _literal(options: tuple, node: Node, key: str, report: Report) -> Any:
    for option in options:
        if type(node.value) is type(option) and node.value == option:
            return option
        if node.shell and node.text == option:
            return option
    named = ", ".join(map(repr, options))
    texts = [option for option in options if isinstance(option, str)]
    hint = other_key(node.value) or did_you_mean(str(node.value), texts)
    return report.add(node, key, f"expected one of {named}, got {_got(node)}{hint}")


def _sequence(hint: Any, node: Node, key: str, report: Report, default: Any) -> Any:
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    fixed = kind is tuple and args and Ellipsis not in args
    if not isinstance(node.value, list) or (fixed and len(args) != len(node.value)):
        usual = f" (write {list(default)}, for instance)" if fixed and isinstance(default, tuple) else ""
        return _mismatch(hint, node, key, report, usual)
    hints = args if fixed else (args[0] if args else Any,) * len(node.value)
    pairs = enumerate(zip(hints, node.value, strict=True))
    items = [_value(item_hint, item, f"{key}[{i}]", report) for i, (item_hint, item) in pairs]
    return FAILED if any(item is FAILED for item in items) else kind(items)


def _mapping(hint: Any, node: Node, key: str, report: Report) -> Any:
    if not isinstance(node.value, dict):
        return _mismatch(hint, node, key, report)
    item_hint = (*typing.get_args(hint), Any, Any)[1]
    items = {name: _value(item_hint, item, f"{key}.{name}", report) for name, item in node.value.items()}
    return FAILED if any(item is FAILED for item in items.values()) else items


def _union(hint: Any, node: Node, key: str, report: Report, default: Any) -> Any:
    """The first alternative that fits, an exact type before a conversion; else what is wrong inside the right shape."""
    inside: list[str] = []
    options: list[str] = []
    for member in sorted(_of_shape(members(hint), node.value), key=lambda member: type(node.value) is not member):
        trial = Report(report.known)
        value = _value(member, node, key, trial, MISSING if default is None else default)
        if value is not FAILED and not trial.problems:
            return value
        if isinstance(node.value, dict) and (is_mapping(member) or dataclasses.is_dataclass(member)):
            inside = inside or trial.problems
        if isinstance(node.value, list) and is_sequence(member):
            inside = inside or trial.problems
        if typing.get_origin(member) is Literal:
            options += [option for option in typing.get_args(member) if isinstance(option, str)]
    if inside:
        report.problems.extend(inside)
        return FAILED
    return _mismatch(hint, node, key, report, did_you_mean(str(node.value), options))


def _of_shape(hints: Sequence[Any], value: Any) -> list[Any]:
    """Those that a mapping or a list could be, if any: in a shell `{ipo: 1}` would be a text as well."""
    fits = {dict: lambda hint: is_mapping(hint) or dataclasses.is_dataclass(hint), list: is_sequence}.get(type(value))
    return [hint for hint in hints if fits and fits(hint)] or list(hints)


def _section(cls: type, node: Node, key: str, report: Report, default: Any) -> Any:
    """An instance of the dataclass `cls`; keys that are not set come from `default` (a recipe's own) or the class."""
    items = {} if node.value is None and node.text == "" else node.value  # `optim:` with nothing beneath
    if not isinstance(items, dict):
        meant = other_key(node.value) or redact(advice.section(cls, node.value, key))
        return report.add(node, key, f"expected a section with keys, got {_got(node)}{meant}")
    hints, fallbacks, prefix = hints_of(cls), defaults_of(cls, default), f"{key}." if key else ""
    for name in [name for name in items if name not in hints and name.partition(":")[0] in hints]:  # `{match:embed}`
        meant, _, value = name.partition(":")
        report.add(items[name], prefix + meant, f"put a space after ':' (write {meant}: {value})")
        items = {k: v for k, v in items.items() if k != name} | {meant: Node(BROKEN, node.where, node.base)}
    for name, item in items.items():
        if name not in hints and "." in name:
            outer, _, inner = name.rpartition(".")
            report.add(item, prefix + name, f"dots are for the command line; write `{outer}:`, below it `{inner}:`")
        elif name not in hints:
            report.add(item, prefix + name, unknown_key(prefix + name, report.known, hints))
    values = {}
    for name, hint in hints.items():
        if name in items:
            values[name] = _value(hint, items[name], prefix + name, report, fallbacks[name])
        elif fallbacks[name] is not MISSING:
            values[name] = fallbacks[name]
        elif dataclasses.is_dataclass(hint):
            values[name] = _section(hint, Node({}, node.where, node.base), prefix + name, report, None)
        else:
            values[name] = report.add(node, prefix + name, f"required, but not set ({type_name(hint)})")
    return _construct(cls, values, fallbacks, Node(items, node.where, node.base), key, report)


def _construct(cls: type, values: dict, fallbacks: dict, node: Node, key: str, report: Report) -> Any:
    """Call the class, which runs the checks of its `__post_init__`.

    Its first complaint hides those that follow. So the key it names goes back to its default and the class is called
    again, for as long as the complaints name other keys that the user has set.
    """
    items = node.value
    clean = not any(value is FAILED for value in values.values())
    to_blame = {name for name in items if values.get(name, FAILED) is not FAILED}
    values = {name: fallbacks[name] if value is FAILED else value for name, value in values.items()}
    if any(value is MISSING for value in values.values()):
        return FAILED
    while True:
        try:
            instance = cls(**values)
            return instance if clean else FAILED
        except (ValueError, UserError) as error:
            name = re.match(r"\w*", str(error)).group()
            if clean or name in to_blame:
                own = name in fallbacks
                prefix = (f"{key}." if own else f"{key}: ") if key else ""
                report.add(items.get(name, node), "", f"{prefix}{error}")
            clean = False
            if name not in to_blame or fallbacks[name] is MISSING:
                return FAILED
            to_blame.discard(name)
            values[name] = fallbacks[name]


def _mismatch(hint: Any, node: Node, key: str, report: Report, hint_at: str = "") -> object:
    """Report a value of the wrong type, with how to write what was probably meant."""
    meant = hint_at or redact(advice.value(hint, node, key))
    return report.add(node, key, f"expected {type_name(hint)}, got {_got(node)}{meant}")


def _got(node: Node) -> str:
    value = node.value
    if isinstance(value, dict):
        return f"a section with {', '.join(map(repr, value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = redact(repr(value))
    kind = {str: "text", int: "whole number", float: "number"}[type(value)]
    return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"
