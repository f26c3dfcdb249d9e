"""Conversations: messages with text or content parts, train weights, reasoning, tool calls and tools."""

import json
from typing import Any

import numpy as np

from ftlib.data.examples import ROLES, Example, Ranges, Shape, listed, shown
from ftlib.errors import UserError

ALIASES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "model": "assistant", "ai": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles whose whole content is one call, or a list of calls
WEIGHTS = ("loss_weight", "train", "weight")
LARGEST = float(np.finfo(np.float32).max)  # as which weights are kept
REASONING = ("reasoning", "thinking", "think")
MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")

PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))  # of a turn that is both sides
SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "input": "user", "assistant": "assistant",
    "output": "assistant",
}  # fmt: skip

Parts = list[tuple[tuple[int, int], float | None]]  # character range in the content, weight if it has one of its own


def read_messages(row: dict[str, Any], shape: Shape, where: str) -> Example:
    """The record of a row whose `messages` column lists the turns of a conversation."""
    example = shape.example(where, tools=read_tools(row.get(shape.column("tools")), where))
    system = row.get(shape.column("system"))
    if isinstance(system, str) and system:
        example.add("system", system)
    return add_turns(example, shape.value(row, "messages", where), shape, shape.column("messages"))


def add_turns(example: Example, turns: Any, shape: Shape, column: str) -> Example:
    """Append the turns of a column, in any spelling."""
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":  # tables cannot hold lists, so some hold them as JSON
        turns = _from_json(turns, column, example.where)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        what = f"column {column!r} must be a list of messages, with at least one in it, here it is {shown(turns)}"
        raise UserError(what, where=example.where)
    for number, turn in enumerate(turns, 1):
        try:
            if isinstance(turn, dict) and is_pair(turn):
                _pair(example, turn)
            else:
                _message(example, turn, shape)
        except UserError as error:
            raise UserError(f"message {number}: {error.what}", where=example.where, fix=error.fix) from None
    return example


def is_pair(turn: dict[str, Any]) -> bool:
    """Whether one object holds a question and its answer."""
    told = "role" in turn or "from" in turn
    return not told and any(asked in turn and answered in turn for asked, answered in PAIRS)


def _pair(example: Example, turn: dict[str, Any]) -> None:
    for key, role in SPEAKERS.items():
        if turn.get(key) is None or (key == "system" and turn[key] == ""):
            continue
        if not isinstance(turn[key], str):
            raise UserError(f"{key!r} must be text, here it is {shown(turn[key])}")
        example.add(role, turn[key])


def _message(example: Example, turn: Any, shape: Shape) -> None:
    if not isinstance(turn, dict):
        raise UserError(f"it must be an object with role and content, here it is {shown(turn)}")
    role_key, content_key = _key(turn, shape, "role", "from"), _key(turn, shape, "content", "value")
    role = _role(turn, role_key, shape)
    read = {"role", "from", "content", "value", role_key, content_key, "train_detail", *WEIGHTS}
    rest = {key: value for key, value in turn.items() if key not in read and value is not None}
    content, parts, found = _content(turn.get(content_key))
    if turn[role_key] in CALLS and turn[role_key] not in ROLES:
        content, found = None, {"tool_calls": _calls(content)}
    rest |= found
    if isinstance(rest.get("tool_calls"), list):
        rest["tool_calls"] = [_parsed(call) for call in rest["tool_calls"]]
    if content is None and (role != "assistant" or not rest.keys() - {"name"}):
        what = f"its {content_key!r} is null" if content_key in turn else f"it has no {content_key!r}"
        raise UserError(f"{what}; it has {listed(turn)}", fix='write its text, or "" where it says nothing')
    if "train_detail" in turn:
        parts = _detail(turn["train_detail"], content or "")
    trained = _trained(parts, weight_of(turn), role in example.train_on)
    example.add(role, content, trained, **rest)
    if content_key not in turn:  # a template tells a missing content from a null one
        del example.messages[-1]["content"]


def _trained(parts: Parts, weight: float | None, by_role: bool) -> bool | float | Ranges | None:
    """What of a message is trained: None leaves it to its role. A part's own weight replaces its message's."""
    weights = [weight if part is None else part for _, part in parts] or [weight]
    wanted = [float(by_role) if part is None else part for part in weights]
    if not any(wanted):
        return False if 0 in weights else None
    if all(part == 1 for part in wanted):
        return None if by_role else True
    if min(wanted) == max(wanted):
        return wanted[0]
    return [(*span, part) for (span, _), part in zip(parts, wanted, strict=True) if part]


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
            fix=f"map it with the source's `roles`: {{{role}: one of {', '.join(ROLES)}}}",
        )
    return ours


def _content(content: Any) -> tuple[str | None, Parts, dict[str, Any]]:
    """The text of a message, its parts if it came in parts, and what else they hold: reasoning and tool calls."""
    if content is None or isinstance(content, str):
        return content, [], {}
    if not isinstance(content, list):
        raise UserError(f"content must be a string or a list of parts, not {shown(content)}")
    text, parts, reasoning, calls = "", [], "", []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        value = part.get("text", part.get("value", part.get(kind))) if isinstance(part, dict) else None
        if kind in ("tool_call", "function_call"):
            calls += _calls(value)
        elif kind in REASONING and isinstance(value, str):
            reasoning += value
        elif kind == "text" and isinstance(value, str):
            parts.append(((len(text), len(text) + len(value)), weight_of(part)))
            text += value
        else:
            raise UserError(f"content part {json.dumps(part)[:60]} is not text (`text` or `value`)")
    found = {"reasoning_content": reasoning} if reasoning else {}
    return text, parts, found | ({"tool_calls": calls} if calls else {})


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them, from an object, a list of them, or either as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"a tool call is invalid JSON: {error}") from None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"a tool call must have a name and arguments, not {shown(call)}")
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass  # some tools take plain text
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return calls


def _parsed(call: Any) -> Any:
    """A call whose arguments are JSON text, as some APIs write them, parsed for the templates."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


def _detail(detail: Any, content: str) -> Parts:
    """`train_detail`: characters begin_offset to end_offset, the last included; what no entry covers is not trained."""
    parts: Parts = []
    if not isinstance(detail, list):
        raise UserError(f"train_detail must be a list of ranges, not {shown(detail)}")
    at = 0
    for entry in sorted(detail, key=lambda e: e.get("begin_offset", -1) if isinstance(e, dict) else -1):
        start, last = (entry.get(k) if isinstance(entry, dict) else None for k in ("begin_offset", "end_offset"))
        if not isinstance(start, int) or not isinstance(last, int) or not at <= start <= last < len(content):
            given = f"{start} to {last}" if isinstance(entry, dict) else shown(entry)
            what = f"train_detail: {given} is no range of this content of {len(content)} characters"
            fix = "begin_offset and end_offset count characters from 0, the last included; ranges do not overlap"
            raise UserError(what, fix=fix)
        weight = weight_of(entry)
        parts += [((at, start), 0.0)] if start > at else []
        parts.append(((start, last + 1), 1.0 if weight is None else weight))
        at = last + 1
    return [*parts, ((at, len(content)), 0.0)] if at < len(content) else parts


def weight_of(holder: dict[str, Any], keys: tuple[str, ...] = WEIGHTS) -> float | None:
    """How much a message, part, range or segment counts, 0 for not at all; None if it does not say.

    A number says how much, true and false say whether: true agrees with every number above 0.
    """
    given = {key: holder[key] for key in keys if holder.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
            said = f"{key} is {shown(value)}"
            what = f"{said}; a weight is true, false or a number from 0 on (in float32): 0.5 counts half"
            raise UserError(what, fix="correct it, or leave it out for what the role says")
    numbers = {float(value) for value in given.values() if not isinstance(value, bool)}
    if len(numbers) > 1 or len({bool(value) for value in given.values()}) > 1:
        raise UserError(f"{' and '.join(given)} disagree", fix="keep one of them")
    return numbers.pop() if numbers else next((float(value) for value in given.values()), None)


def read_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of a row: a list, or the same as JSON; None where there are none."""
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools", where)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("column 'tools' must be a list of objects", where=where)
    return tools


def _from_json(text: str, column: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"column {column!r} holds invalid JSON: {error}", where=where) from None
