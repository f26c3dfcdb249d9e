"""Conversations: messages with text or content parts, train weights, tool calls and tools."""

import json
from typing import Any

from ftlib.data.examples import ROLES, Example, Shape, listed
from ftlib.errors import UserError

ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}
WEIGHTS = ("loss_weight", "train", "weight")

Parts = list[tuple[tuple[int, int], bool | None]]  # character range in the content, weight if it has one of its own


def read_messages(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """The record of a row whose `messages` column lists the turns of a conversation."""
    turns = shape.value(row, "messages", where)
    if not isinstance(turns, list) or not turns:
        column = shape.column("messages")
        raise UserError(f"column {column!r} must be a list of messages, with at least one in it", where=where)
    example = Example(where, messages=[], tools=_tools(row.get(shape.column("tools")), where))
    system = row.get(shape.column("system"))
    if isinstance(system, str) and system:
        example.add("system", system)
    for number, turn in enumerate(turns, 1):
        try:
            _message(example, turn, shape)
        except UserError as error:
            raise UserError(f"message {number}: {error.what}", where=where, fix=error.fix) from None
    return example


def _message(example: Example, turn: Any, shape: Shape) -> None:
    if not isinstance(turn, dict):
        raise UserError("it must be an object with role and content")
    role_key, content_key = _key(turn, shape, "role", "from"), _key(turn, shape, "content", "value")
    role = _role(turn, role_key, shape)
    read = {"role", "from", "content", "value", role_key, content_key, *WEIGHTS}
    rest = {key: value for key, value in turn.items() if key not in read and value is not None}
    content, parts = _content(turn.get(content_key))
    if content is None and (role != "assistant" or not rest.keys() - {"name"}):
        raise UserError(f"it has no {content_key!r}; it has {listed(turn)}")
    weight = _weight(turn)
    weights = [weight if part is None else part for _, part in parts] or [weight]
    if role != "assistant" and True in weights:
        raise UserError(f"a {role} message asks to be trained; only assistant messages are", fix="set its weight to 0")
    if False not in weights:
        trained = None
    elif True in weights or None in weights:
        trained = [span for (span, _), wanted in zip(parts, weights, strict=True) if wanted is not False]
    else:
        trained = False
    example.add(role, content, trained, **rest)
    if content_key not in turn:  # a template tells a missing content from a null one
        del example.messages[-1]["content"]


def _key(turn: dict[str, Any], shape: Shape, name: str, alias: str) -> str:
    """The message's key for `name`: mapped in the config, or one of the two spellings in use."""
    mapped = shape.column(name)
    return alias if mapped == name and name not in turn and alias in turn else mapped


def _role(turn: dict[str, Any], key: str, shape: Shape) -> str:
    role = turn.get(key)
    if role is None:
        raise UserError(f"it has no {key!r}; it has {listed(turn)}")
    ours = shape.roles.get(role, role) if isinstance(role, str) else None
    if ours not in ROLES:
        raise UserError(
            f"unknown role {role!r}",
            fix=f"map it with the source's `roles`, for example {{{role}: tool}}; known: {', '.join(ROLES)}",
        )
    return ours


def _content(content: Any) -> tuple[str | None, Parts]:
    """The text of a message, and its parts if it came in parts."""
    if content is None or isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise UserError(f"content must be a string or a list of parts, not {json.dumps(content)[:40]}")
    text, parts = "", []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(value, str) or part.get("type", "text") != "text":
            raise UserError(f"content part {json.dumps(part)[:60]} is not text (`text` or `value`)")
        parts.append(((len(text), len(text) + len(value)), _weight(part)))
        text += value
    return text, parts


def _weight(holder: dict[str, Any]) -> bool | None:
    """Whether a message or part asks to be trained; None if it does not say."""
    given = {key: holder[key] for key in WEIGHTS if holder.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise UserError(f"{key} is {value!r}; a weight is 0 (not trained) or 1 (trained)")
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise UserError(f"{' and '.join(given)} disagree", fix="keep one of them")
    return values.pop() if values else None


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"column 'tools' holds invalid JSON: {error}", where=where) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("column 'tools' must be a list of objects", where=where)
    return tools
