"""Which shape the rows of a source have: detected from the columns, or named in the config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftlib.data.examples import ROLES, Example, Shape, listed
from ftlib.data.messages import ALIASES, read_messages
from ftlib.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Format:
    """`match(row, columns)` gives the deciding columns (ours -> the file's), or nothing if the row is no such row."""

    match: Callable[[dict[str, Any], Mapping[str, str]], dict[str, str]]
    read: Callable[[dict[str, Any], Shape, str], Example]
    columns: tuple[str, ...]
    needs: str


def choose_shape(row: dict[str, Any], format: str, columns: dict[str, str], roles: dict[str, str], key: str) -> Shape:
    """The shape of a source, from its first row and what the config says (`key`: its place there, for errors)."""
    known = ("auto", *FORMATS)
    if format not in known:
        raise UserError(
            f"unknown format {format!r}{did_you_mean(format, known)}",
            where=f"{key}.format",
            fix=f"one of: {', '.join(known)}",
        )
    for theirs, ours in roles.items():
        if ours not in ROLES:
            raise UserError(
                f"role {theirs!r} is mapped to {ours!r}", where=f"{key}.roles", fix=f"one of: {', '.join(ROLES)}"
            )
    for ours, theirs in columns.items():
        if ours not in MESSAGE_COLUMNS and theirs not in row:
            what = f"column {theirs!r} not found{did_you_mean(theirs, row)}; the file has {listed(row)}"
            raise UserError(what, where=f"{key}.columns.{ours}")
    tried = {name: FORMATS[name].match(row, columns) for name in (FORMATS if format == "auto" else [format])}
    name = next((name for name, found in tried.items() if found), None)
    if name is None:
        raise _unmatched(row, format, key)
    for ours in columns:
        if ours not in FORMATS[name].columns:
            raise UserError(
                f"format {name} has no column {ours!r}{did_you_mean(ours, FORMATS[name].columns)}",
                where=f"{key}.columns",
                fix=f"its columns: {', '.join(FORMATS[name].columns)}",
            )
    evidence = f"it has {' and '.join(tried[name].values())}" if format == "auto" else "named in the config"
    return Shape(name, {**tried[name], **columns}, {**ALIASES, **roles}, evidence)


def read_example(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """The record of one row. UserError (naming `where`) if the row does not have this shape."""
    return FORMATS[shape.format].read(row, shape, where)


def _unmatched(row: dict[str, Any], format: str, key: str) -> UserError:
    if format == "auto" and {"chosen", "rejected"} <= row.keys():
        return UserError(
            "this is preference data (columns chosen and rejected), which is not trained on here",
            where=key,
            fix="give rows with messages, with instruction and output, or with text",
        )
    wanted = "fit no known format" if format == "auto" else f"do not fit the format {format}"
    needs = "; ".join(f"{name} needs {FORMATS[name].needs}" for name in (FORMATS if format == "auto" else [format]))
    return UserError(
        f"the columns {listed(row)} {wanted} ({needs})",
        where=key,
        fix=f"say which column is which, for example {key}.columns: {{instruction: question, output: answer}}",
    )


def _match_messages(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    names = [columns["messages"]] if "messages" in columns else ["messages", "conversations"]
    found = next((name for name in names if name in row), None)
    return {"messages": found} if found else {}


def _match_columns(*needed: str) -> Callable[[dict[str, Any], Mapping[str, str]], dict[str, str]]:
    def match(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
        found = {name: columns.get(name, name) for name in needed}
        return found if all(column in row for column in found.values()) else {}

    return match


def _read_alpaca(row: dict[str, Any], shape: Shape, where: str) -> Example:
    instruction, output = (shape.text(row, name, where) for name in ("instruction", "output"))
    question, system = (shape.text(row, name, where, needed=False) for name in ("input", "system"))
    example = Example(where, messages=[])
    if system:
        example.add("system", system)
    history = row.get(shape.column("history")) or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise UserError(
                f"column {shape.column('history')!r} must be a list of [question, answer] pairs", where=where
            )
        example.add("user", turn[0])
        example.add("assistant", turn[1])
    example.add("user", "\n".join(filter(None, (instruction, question))))
    example.add("assistant", output)
    return example


def _read_text(row: dict[str, Any], shape: Shape, where: str) -> Example:
    return Example(where, text=shape.text(row, "text", where))


MESSAGE_COLUMNS = ("role", "content")  # keys of a message, not columns of a row
FORMATS = {  # in the order of detection
    "messages": Format(
        _match_messages,
        read_messages,
        ("messages", "tools", "system", *MESSAGE_COLUMNS),
        "a list in `messages` or `conversations`",
    ),
    "alpaca": Format(
        _match_columns("instruction", "output"),
        _read_alpaca,
        ("instruction", "input", "output", "system", "history"),
        "`instruction` and `output`",
    ),
    "text": Format(_match_columns("text"), _read_text, ("text",), "`text`"),
}
