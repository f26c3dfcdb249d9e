"""The one record every row becomes, and how a source's columns and roles map onto it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlib.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class Example:
    """One row, whatever its file looked like: a conversation (`messages`, `tools`) or plain `text`.

    Messages carry what a chat template reads: role, content, tool_calls, name, … `trained` has one entry a message:
    all of it, nothing, or the character ranges of its content that are trained. `where` is `file:line`.
    """

    where: str
    messages: list[dict[str, Any]] | None = None
    trained: list[bool | list[tuple[int, int]]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None

    def add(
        self, role: str, content: str | None, trained: bool | list[tuple[int, int]] | None = None, **rest: Any
    ) -> None:
        """Append a message. By default an assistant's is trained, unless it is blank: silence is never trained."""
        if trained is None:
            trained = role == "assistant" and (bool((content or "").strip()) or bool(rest.keys() - {"name"}))
        self.messages.append({"role": role, "content": content, **rest})
        self.trained.append(trained)


@dataclass(frozen=True)
class Shape:
    """How rows of a source are read: format, its columns -> the file's, role names -> ours, and why this format."""

    format: str
    columns: Mapping[str, str]
    roles: Mapping[str, str]
    evidence: str

    def column(self, name: str) -> str:
        """The file's name of one of the format's columns."""
        return self.columns.get(name, name)

    def value(self, row: dict[str, Any], name: str, where: str) -> Any:
        """What a row has in a column of the format. UserError if it has no such column."""
        column = self.column(name)
        if column not in row:
            raise UserError(f"column {column!r} not found; this row has {listed(row)}", where=where)
        return row[column]

    def text(self, row: dict[str, Any], name: str, where: str, needed: bool = True) -> str:
        """The same for a column of text; an empty string where it is missing and not `needed`."""
        value = self.value(row, name, where) if needed else row.get(self.column(name))
        if value is None and not needed:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"column {self.column(name)!r} must be text, here it is {json.dumps(value)[:40]}", where=where
            )
        return value


def listed(row: dict[str, Any]) -> str:
    """Names of columns, for a message."""
    return f"[{', '.join(map(str, row))}]"
