"""Chat templates in a sandbox: rendered as transformers renders them, within a time and size limit, and traced.

A template is a program from a stranger. It runs in Jinja's immutable sandbox; every turn of a loop checks the clock,
and products that would fill the memory are refused. The same check records where each message was written.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftlib.errors import UserError

OUTPUT_LIMIT = 1 << 20  # characters
SECONDS = 2.0  # of this thread's processor time, so that a loaded machine does not fail a good template
UNKNOWN = -1  # a message of the template's own making
TRACE = "_ftlib_trace"  # the trace of a rendering, under this name in its context


@dataclass
class Trace:
    """What happened while rendering: output so far, and the stretches written for a message or inside {% generation %}.

    A stretch is (start, end, index of the message). Output written while a loop's variable is the message, or a copy
    of it, belongs to that message.
    """

    messages: list[dict[str, Any]]
    deadline: float
    position: int = 0
    generation: list[tuple[int, int, int | None]] = field(default_factory=list)
    written: list[tuple[int, int, int]] = field(default_factory=list)
    _open: dict[int, tuple[int, int]] = field(default_factory=dict)  # loop -> (start, message)
    _last: dict[int, int] = field(default_factory=dict)  # loop -> highest message so far
    _generating: int = 0

    def enter(self, loop: int, value: Any) -> None:
        """A loop's variable took a value."""
        if time.thread_time() > self.deadline:
            raise UserError(f"the chat template ran for more than {SECONDS:g} seconds", fix="it may loop for ever")
        self.leave(loop)
        index = self._index(value, self._last.get(loop, -1))
        if index is not None:
            self._open[loop] = (self.position, index)
            self._last[loop] = max(index, self._last.get(loop, -1))

    def leave(self, loop: int) -> None:
        """A loop ended, or goes on to its next value."""
        if loop in self._open:
            start, index = self._open.pop(loop)
            if self.position > start:
                self.written.append((start, self.position, index))

    def begin(self) -> None:
        self._generating = self.position

    def end(self) -> None:
        current = next((index for _, index in reversed(self._open.values())), None)
        self.generation.append((self._generating, self.position, current))

    def _index(self, value: Any, after: int) -> int | None:
        """Which message a loop's value is: the same object, or the template's copy. UNKNOWN if it looks like one."""
        if not isinstance(value, dict) or "role" not in value:
            return None
        for i, message in enumerate(self.messages):
            if message is value:
                return i
        for i in range(after + 1, len(self.messages)):
            message = self.messages[i]
            if message.get("role") == value["role"] and (message.get("content") or "") == (value.get("content") or ""):
                return i
        return UNKNOWN


def render(template: str, messages: list[dict], variables: dict[str, Any]) -> tuple[str, Trace]:
    """The rendered conversation and its trace. UserError for anything a template does wrong."""
    trace = Trace(messages, time.thread_time() + SECONDS)
    try:
        compiled = _compile(template)
        parts = []
        for part in compiled.generate(messages=messages, **variables, **{TRACE: trace}):
            parts.append(part)
            trace.position += len(part)
            if trace.position > OUTPUT_LIMIT:
                raise UserError(f"the chat template wrote more than {OUTPUT_LIMIT:,} characters")
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f"chat template, line {line}" if line else "chat template"
        raise UserError(f"{type(error).__name__}: {error.message or error}", where=where) from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"the chat template failed: {error}", where=f"chat template{_line(error)}") from None
    except (RecursionError, MemoryError) as error:
        raise UserError(f"the chat template is too deep or too large ({type(error).__name__})") from None
    return "".join(parts), trace


def _line(error: Exception) -> str:
    """The template's line in a traceback: frames of compiled templates carry it."""
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":
            line = at.tb_lineno
        at = at.tb_next
    return f", line {line}" if line else ""


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_call("begin", line), *body, _call("end", line)]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, and limits on what it leaves open: `'x' * 10 ** 9` and powers."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise UserError("the chat template computes too large a power")
        for text, count in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > OUTPUT_LIMIT:
                raise UserError(f"the chat template makes a text of more than {OUTPUT_LIMIT:,} characters")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for number, loop in enumerate(list(tree.find_all(nodes.For))):
            target = loop.target if isinstance(loop.target, nodes.Name) else None
            value = nodes.Name(target.name, "load") if target else nodes.Const(None)
            loop.body.insert(0, _call("enter", loop.lineno, nodes.Const(number), value))
        _close_loops(tree)
        tree.set_environment(self)
        return tree


def _close_loops(tree: nodes.Node) -> None:
    """After each loop, tell the trace that it is over."""
    for node in [tree, *tree.find_all(nodes.Node)]:
        for fields in ("body", "else_", "elif_"):
            children = getattr(node, fields, None)
            if not isinstance(children, list):
                continue
            out = []
            for child in children:
                out.append(child)
                if isinstance(child, nodes.For):
                    out.append(_call("leave", child.lineno, child.body[0].node.args[0]))
            children[:] = out


def _call(method: str, line: int, *arguments: nodes.Expr) -> nodes.ExprStmt:
    call = nodes.Call(nodes.Name("_ftlib_" + method, "load"), [*arguments], [], None, None, lineno=line)
    return nodes.ExprStmt(call, lineno=line)


def _global(method: str) -> Callable[..., Any]:
    @pass_context
    def call(context: Any, *arguments: Any) -> None:
        getattr(context[TRACE], method)(*arguments)

    return call


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, arguments as transformers' filter has them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=64)
def _compile(template: str) -> Any:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    for method in ("enter", "leave", "begin", "end"):
        environment.globals["_ftlib_" + method] = _global(method)
    return environment.from_string(template)
