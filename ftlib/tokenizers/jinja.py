"""Chat templates, rendered as transformers renders them, in a sandbox with limits, noting who wrote what."""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from ftlib.errors import UserError
from ftlib.tokenizers.instrument import PREFIX, instrument
from ftlib.tokenizers.limits import OUTPUT, Meter, TooMuch, check_call, check_filter, check_operator
from ftlib.tokenizers.trail import Trail


class Event(NamedTuple):
    """A piece of output, the message it belongs to (or NOBODY, UNCLEAR of `trail`), and whether it is all of a
    {% generation %} block."""

    text: str
    owner: int
    generated: bool


class Rendering(NamedTuple):
    """Output in pieces, and how many {% generation %} blocks ran: more than there are pieces if some were captured."""

    events: list[Event]
    generations: int


@dataclass
class _Running:
    meter: Meter
    trail: Trail
    generations: int = 0


_RUNNING: ContextVar[_Running] = ContextVar("running")  # of this thread or task


def render(
    template: str, messages: Sequence[dict[str, Any]], variables: dict[str, Any], meter: Meter | None = None
) -> tuple[str, Rendering]:
    """A conversation as text, and piece by piece. `variables`: tools, bos_token, and whatever else the template reads.

    The template runs in a sandbox for at most two seconds and writes at most 1 MiB. UserError, with the template's
    line, for what it cannot do, and for a conversation that it refuses (raise_exception).
    """
    for name, values in (("messages", messages), ("tools", variables.get("tools") or ())):
        if not isinstance(values, list | tuple) or not all(isinstance(value, dict) for value in values):
            raise UserError(f"{name} for a chat template must be a list of dicts")
    own = [dict(message) for message in messages]  # each an object of its own, to tell equal ones apart
    running = _Running(meter or Meter(), Trail(own))
    before = _RUNNING.set(running)
    try:
        rendering = _collect(_compiled(template).generate(variables, messages=own), running)
    except Exception as error:
        raise _explained(error) from None
    finally:
        _RUNNING.reset(before)
    return "".join(event.text for event in rendering.events), rendering


def _collect(pieces: Iterable[str], running: _Running) -> Rendering:
    events, length = [], 0
    for text in pieces:
        events.append(Event(text, running.trail.owner, isinstance(text, _Generated)))
        length += len(text)
        if length > OUTPUT:
            raise TooMuch(f"it wrote more than {OUTPUT:,} characters")
    return Rendering(events, running.generations)


class _Generated(str):
    """What a {% generation %} block wrote."""

    __slots__ = ()


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant writes. A scope of its own, as in transformers."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Callable[[], str]) -> str:
        _RUNNING.get().generations += 1
        return _Generated(caller())


NOW = "strftime_now"
_OF_DICTS = frozenset(dir(dict))
_SMALL = 1 << 12  # characters of a sum that need not be weighed: the deadline bounds how many there are


class _Generator(CodeGenerator):
    """Calls what is ours directly: the sandbox's way costs more than the instruments do."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute | nodes.ExtensionAttribute):
            return super().visit_Call(node, frame, forward_caller=forward_caller)
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write("caller=caller)" if forward_caller else ")")

    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:
        parts = [node.right]
        while isinstance(node.left, nodes.Add):
            node = node.left
            parts.append(node.right)
        self.write(f"environment.{PREFIX}add(context")
        for part in (node.left, *reversed(parts)):
            self.write(", ")
            self.visit(part, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with our limits."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Generator

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_DICTS:  # the same, without two exceptions on the way
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument not in _OF_DICTS:
            return obj[argument] if argument in obj else self.undefined(obj=obj, name=argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        found = super().call_binop(context, operator, left, right)
        return found if isinstance(found, list | tuple) else _RUNNING.get().meter.weigh(found)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = _RUNNING.get().meter
        meter.tick()
        if type(function) is Macro:
            for scope in ("_loop_vars", "_block_vars"):
                kwargs.pop(scope, None)
            return meter.weigh(function(context.eval_ctx, *args, **kwargs))
        meter.watch(NOW if function is _now else "", (*args, *kwargs.values()))
        check_call(function, (*args, *kwargs.values()))
        return meter.weigh(super().call(context, function, *args, **kwargs))


class _Namespace(Namespace):
    """Jinja's, but printed by name alone: namespaces within each other could print for ever."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the limits. Some of Jinja's get the context before the value."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        meter = _RUNNING.get().meter
        meter.tick()
        meter.watch(name, (*args[first:], *kwargs.values()))
        check_filter(name, args[first] if len(args) > first else None, (*args[first + 1 :], *kwargs.values()))
        return meter.weigh(function(*args, **kwargs))

    return limited


@functools.cache
def _environment() -> Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _limited(name, function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]  # writes any amount of text
    environment.globals["namespace"] = _Namespace
    environment.globals |= {"raise_exception": _raise, NOW: _now}
    for function in (begin, turn, end, assigned, tick, write, weigh, add):
        setattr(environment, PREFIX + function.__name__, function)
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = _environment()
    code = environment.compile(instrument(_parsed(template)))
    return Template.from_code(environment, code, environment.make_globals(None))


@functools.lru_cache(maxsize=64)
def has_captures(template: str) -> bool:
    """Whether a template keeps what a {% set %} block writes."""
    return next(_parsed(template).find_all(nodes.AssignBlock), None) is not None


@functools.lru_cache(maxsize=64)
def variables(template: str) -> frozenset[str]:
    """Names that a template reads and that whoever renders it may set."""
    return frozenset(meta.find_undeclared_variables(_parsed(template)) - _environment().globals.keys())


def _parsed(template: str) -> nodes.Template:
    if len(template) > OUTPUT:
        raise UserError(f"the chat template itself has more than {OUTPUT:,} characters")
    try:
        return _environment().parse(template)
    except Exception as error:
        raise _explained(error) from None


def begin() -> None:
    _RUNNING.get().trail.begin()


def turn(*values: Any) -> None:
    running = _RUNNING.get()
    running.meter.tick()
    running.trail.turn(*values)


def end() -> None:
    _RUNNING.get().trail.end()


def assigned(value: Any) -> None:
    _RUNNING.get().trail.assigned(value)


def tick() -> bool:
    return _RUNNING.get().meter.tick()


def write(value: Any) -> Any:
    return _RUNNING.get().meter.write(value)


def add(context: Context, *parts: Any) -> Any:
    for part in parts:
        if type(part) is not str:
            return functools.reduce(lambda one, other: _environment().call_binop(context, "+", one, other), parts)
    text = "".join(parts)
    return text if len(text) <= _SMALL else weigh(text)


def weigh(value: Any) -> Any:
    return _RUNNING.get().meter.weigh(value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers' filter of this name gives it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Refused(TemplateError):
    """raise_exception was called."""


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise _Refused(message)


_MEND = "mend the template, or name another: data.template=chatml"


def _explained(error: Exception) -> UserError:
    """Any failure of a template as a message with its line."""
    if isinstance(error, UserError):
        return error
    text = str(error).strip() or type(error).__name__
    line = error.lineno if isinstance(error, TemplateSyntaxError) else _line(error)
    where = f"chat template, line {line}" if line else "chat template"
    if isinstance(error, _Refused):
        return UserError(f"the chat template refuses this conversation: {text}", where=where)
    if isinstance(error, TooMuch):
        return UserError(f"the chat template was stopped: {text}", where=where, fix="use a template you trust")
    if isinstance(error, SecurityError):
        return UserError(f"the chat template does what the sandbox forbids: SecurityError: {text}", where=where)
    if isinstance(error, TemplateSyntaxError):
        return UserError(f"the chat template cannot be read: {text}", where=where, fix=_MEND)
    if isinstance(error, RecursionError | MemoryError):
        text = "it calls itself too deeply" if isinstance(error, RecursionError) else "it needs too much memory"
    return UserError(f"the chat template failed: {text}", where=where, fix=_MEND)


def _line(error: Exception) -> int | None:
    """The template's line in a traceback, where Jinja's frames carry it; the innermost one."""
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":
            line = at.tb_lineno
        at = at.tb_next
    return line
