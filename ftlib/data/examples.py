"""The one record every row becomes, and how a source's columns and roles map onto it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlib.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
MEND = "mend or remove this row"
Ranges = list[tuple[int, int, float]]  # characters [start, end) of a message's content, and their weight


@dataclass(slots=True)
class Example:
    """One row, whatever its file looked like. `where` is `file:line`; `extra` are the columns that were not read.

    A conversation: `messages` and `tools`. They carry what a chat template reads: role, content, tool_calls, name, …
    `trained` has one entry a message: all of it, nothing, all of it with a weight, or trained ranges of its content.
    Without a template: `text`, all trained; `segments` of text with whether, or how much, each is trained; `ids` with
    `trained_ids`.
    Rows that supervised training has no use for, such as preferences, have a `record`; `messages` is their prompt.
    """

    where: str
    messages: list[dict[str, Any]] | None = None
    trained: list[bool | float | Ranges] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    segments: list[tuple[str, bool | float]] | None = None
    ids: list[int] | None = None
    trained_ids: list[bool] | None = None
    record: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    train_on: tuple[str, ...] = ("assistant",)
    closed: bool = False  # segments: put BOS in front and a trained EOS behind
    unwritten: int = 0  # messages whose reasoning the template left out

    def add(
        self, role: str, content: str | None, trained: bool | float | Ranges | None = None, **rest: Any
    ) -> None:
        """Append a message. By default its role decides whether it is trained; silence never is."""
        said = bool((content or "").strip()) or bool(rest.keys() - {"name"})
        if trained is None:
            trained = role in self.train_on and said
        elif isinstance(trained, float):
            trained = said and trained
        self.messages.append({"role": role, "content": content, **rest})
        self.trained.append(trained)


def no_weights(example: Example, use: str) -> Example:
    """The record, whose messages are trained or not; UserError where one has a weight, for a use that has none."""
    for number, trained in enumerate(example.trained, 1):
        if isinstance(trained, float) or (isinstance(trained, list) and any(weight != 1 for *_, weight in trained)):
            raise UserError(
                f"message {number} has a weight other than 0 and 1, which {use} have no use for",
                where=example.where,
                fix="leave it out; weights are for the answers of supervised fine-tuning",
            )
    return example


@dataclass(frozen=True)
class Shape:
    """How rows of a source are read: format, its columns -> the file's, role names -> ours, and why this format."""

    format: str
    columns: Mapping[str, str]
    roles: Mapping[str, str]
    evidence: str
    train_on: tuple[str, ...] = ("assistant",)
    read: Any = None  # (row, shape, where) -> Example or list of them

    def example(self, where: str, **content: Any) -> Example:
        """A conversation to add messages to."""
        return Example(where, messages=[], train_on=self.train_on, **content)

    def column(self, name: str) -> str:
        """The file's name of one of the format's columns."""
        return self.columns.get(name, name)

    def value(self, row: dict[str, Any], name: str, where: str) -> Any:
        """What a row has in a column of the format. UserError if it has no such column."""
        return cell(row, self.column(name), where)

    def text(self, row: dict[str, Any], name: str, where: str, needed: bool = True) -> str:
        """The same for a column of text; an empty string where it is missing and not `needed`."""
        value = self.value(row, name, where) if needed else row.get(self.column(name))
        if value is None and not needed:
            return ""
        if not isinstance(value, str):
            said = shown(value)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            fix = f'write it as text: "{said}"' if number else f"{MEND}, or set data.on_bad_row=skip"
            raise UserError(f"column {self.column(name)!r} must be text, here it is {said}", where=where, fix=fix)
        return value


def nested(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row, and in it a column for each one of the file that leads into another: `reward_model.ground_truth`."""
    found = {}
    for name in columns.values():
        *path, last = name.split(".")
        value: Any = row
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if path and name not in row and isinstance(value, dict) and last in value:
            found[name] = value[last]
    return {**row, **found} if found else row


def cell(row: dict[str, Any], column: str, where: str) -> Any:
    """What a row has in a column of the file. UserError if it has no such column."""
    if column not in row:
        what = f"column {column!r} not found; this row has {listed(row)}"
        fix = f"{MEND}, or set data.on_bad_row=skip; rows of another shape go into a file, and a source, of their own"
        raise UserError(what, where=where, fix=fix)
    return row[column]


def listed(row: dict[str, Any]) -> str:
    """Names of columns, for a message."""
    return f"[{', '.join(map(str, row))}]"


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    return json.dumps(value, default=str)[:40]
