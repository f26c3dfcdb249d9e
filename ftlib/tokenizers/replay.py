"""A template rendered once for conversations of one shape, and by substitution from then on, where that is provably so.

The first conversation of a shape (its roles) is rendered with a placeholder for each content. A placeholder may be
written, trimmed and added to; what the template asks of it (is it empty, does it hold `</think>`) is answered from the
content and kept as a condition on the contents that follow. Anything else that a template does with a content, and
whatever changes from day to day, ends the attempt: then, and where a condition fails, the template itself is rendered.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ftlib.errors import UserError
from ftlib.tokenizers.jinja import NOW, has_captures, render
from ftlib.tokenizers.limits import OUTPUT, Meter
from ftlib.tokenizers.spans import Messages, Rendered, Span, marked, render_with_spans

MARK = "\ue0f7"  # around a placeholder; a private character, of which no template knows
SHAPES, WAYS = 256, 4  # shapes kept at a time, and ways that contents of one shape are treated
_STRUCTURAL = ("length", "count", "list", "first", "last", "reverse", "selectattr", "rejectattr")  # filters of lists
_HARMLESS = ("trim", "string", "default", "d")  # filters of a content, by its own methods below
_CHANGING = ("random", NOW)
_TRIMS = ("strip", "lstrip", "rstrip")
_ASKS = ("startswith", "endswith")

Trims = tuple[tuple[str, tuple[str, ...]], ...]  # (method, arguments), one after the other


class _Untold(BaseException):
    """The template did something with a content that cannot be replayed. No handler of Jinja's may catch it."""


class _Guard(NamedTuple):
    """`method(content)` of a conversation's message, trimmed so, gave `found`."""

    index: int
    trims: Trims
    method: str
    arguments: tuple[Any, ...]
    found: Any

    def holds(self, contents: Sequence[str]) -> bool:
        return getattr(str, self.method, _is_filled)(_trimmed(contents[self.index], self.trims), *self.arguments) == (
            self.found
        )


def _is_filled(text: str) -> bool:
    return bool(text)


def _trimmed(text: str, trims: Trims) -> str:
    for method, arguments in trims:
        text = getattr(text, method)(*arguments)
    return text


class _Recorder(Meter):
    """A meter that also sees that placeholders go nowhere else."""

    def __init__(self, contents: Sequence[str]) -> None:
        super().__init__()
        self.contents = contents
        self.guards: dict[_Guard, None] = {}
        self.places: dict[str, tuple[int, Trims]] = {}  # placeholder -> which content, trimmed how

    def placeholder(self, index: int, trims: Trims) -> "_Content":
        name = next((name for name, place in self.places.items() if place == (index, trims)), None)
        name = name or f"{MARK}{len(self.places)}{MARK}"
        self.places[name] = index, trims
        return _Content(name, self)

    def weigh(self, value: Any) -> Any:
        value = super().weigh(value)
        return _Content(value, self) if type(value) is str and MARK in value else value

    def watch(self, name: str, values: Sequence[Any]) -> None:
        harmless = name in _HARMLESS and isinstance(values[0], _Content)
        if harmless or (name in _STRUCTURAL and not isinstance(values[0], str)):
            values = values[1:]
        if name in _CHANGING or any(map(_holds, values)):
            raise _Untold


def _holds(value: Any) -> bool:
    """Whether a placeholder is in a value."""
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds, value))


def _refused(*_: Any, **__: Any) -> Any:
    raise _Untold


class _Content(str):
    """A placeholder, alone or amid other text, while a template is watched."""

    def __new__(cls, text: str, recorder: _Recorder) -> "_Content":
        made = str.__new__(cls, text)
        object.__setattr__(made, "_recorder", recorder)
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in _TRIMS:
            return lambda *arguments: _trim(self, name, arguments)
        if name in _ASKS:
            return lambda *arguments: _ask(self, name, arguments)
        if name == "__class__":
            return _Content
        if name == "__html__":
            raise AttributeError(name)
        raise _Untold

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return _ask(self, "filled", ())

    def __contains__(self, part: str) -> bool:
        return _ask(self, "__contains__", (part,))

    def __eq__(self, other: object) -> bool:
        return _ask(self, "__eq__", (other,)) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: str) -> str:
        return _Content(str.__add__(self, other), _recorder(self))

    def __radd__(self, other: str) -> str:
        return _Content(str.__add__(other, self), _recorder(self))

    # `len` is left to the meter; templates get at it by filters alone, which are watched.
    __hash__ = __iter__ = __getitem__ = __repr__ = __format__ = _refused
    __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __rmod__ = __mul__ = __rmul__ = _refused


def _recorder(content: _Content) -> _Recorder:
    return object.__getattribute__(content, "_recorder")


def _place(content: _Content) -> tuple[int, Trims]:
    """Which content this is, if it is one and nothing else."""
    name = "".join((content,))
    places = _recorder(content).places
    if name not in places:
        raise _Untold
    return places[name]


def _plain(arguments: Sequence[Any]) -> bool:
    return all(type(argument) is str and MARK not in argument for argument in arguments)


def _trim(content: _Content, method: str, arguments: tuple[Any, ...]) -> _Content:
    index, trims = _place(content)
    arguments = () if arguments == (None,) else arguments
    if not _plain(arguments):
        raise _Untold
    return _recorder(content).placeholder(index, (*trims, (method, arguments)))


def _ask(content: _Content, method: str, arguments: tuple[Any, ...]) -> bool:
    index, trims = _place(content)
    if not _plain(arguments):
        raise _Untold
    recorder = _recorder(content)
    guard = _Guard(index, trims, method, arguments, None)
    text = _trimmed(recorder.contents[index], trims)
    found = getattr(str, method, _is_filled)(text, *arguments)
    recorder.guards[guard._replace(found=found)] = None
    return found


class _Plan(NamedTuple):
    """Text and contents in turn, where spans begin and end in these (piece, characters into it), and for which
    contents."""

    pieces: list[str | tuple[int, Trims]]
    spans: list[tuple[tuple[int, int], tuple[int, int], int]]
    guards: list[_Guard]

    def fill(self, contents: Sequence[str]) -> Rendered | None:
        """None if the template would treat these contents in another way."""
        if not all(guard.holds(contents) for guard in self.guards):
            return None
        texts = [piece if isinstance(piece, str) else _trimmed(contents[piece[0]], piece[1]) for piece in self.pieces]
        text, starts = "".join(texts), [0, *accumulate(map(len, texts))]
        spans = [Span(starts[a] + b, starts[c] + d, index) for (a, b), (c, d), index in self.spans]
        if len(text) > OUTPUT or any(start >= end for start, end, _ in spans):
            return None
        return Rendered(text, spans)


class Replay:
    """Renders conversations with one template, as `render_with_spans` does for assistants."""

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        self._template, self._variables = template, variables
        self._plans: dict[tuple[str, ...], list[_Plan | None]] = {}
        self._able = not has_captures(template) and not _holds(variables)

    def render(self, messages: Messages) -> Rendered:
        """A conversation without tools."""
        shape = _shape(messages) if self._able else None
        if shape is None:
            return render_with_spans(self._template, messages, self._variables)
        contents = [message["content"] for message in messages]
        if len(self._plans) > SHAPES:
            self._plans.clear()
        plans = self._plans.setdefault(shape, [])
        for plan in plans:
            found = plan and plan.fill(contents)
            if found:
                return found
        rendered = render_with_spans(self._template, messages, self._variables)
        if len(plans) < WAYS and None not in plans:
            plan = self._recorded(messages, contents)
            plans.append(plan if plan and plan.fill(contents) == rendered else None)
        return rendered

    def _recorded(self, messages: Messages, contents: Sequence[str]) -> _Plan | None:
        recorder = _Recorder(contents)
        asked = [{**m, "content": recorder.placeholder(i, ())} for i, m in enumerate(messages)]
        variables = {**self._variables, "add_generation_prompt": False}
        try:
            text, rendering = render(self._template, asked, variables, recorder)
        except (_Untold, UserError):
            return None
        return _plan(text, marked(rendering, messages), recorder) if rendering.generations else None


def _shape(messages: Messages) -> tuple[str, ...] | None:
    """The roles of a conversation of plain texts; None for any other."""
    roles = []
    for message in messages:
        if tuple(message) != ("role", "content") or type(message["content"]) is not str:
            return None
        roles.append(message["role"])
    return tuple(roles) if _plain(roles) else None


def _plan(text: str, spans: Sequence[Span], recorder: _Recorder) -> _Plan | None:
    parts = text.split(MARK)  # text, number of a placeholder, text, …
    places = list(recorder.places.values())
    pieces = [part if i % 2 == 0 else places[int(part)] for i, part in enumerate(parts)]
    starts = [0, *accumulate(len(part) + 2 * (i % 2) for i, part in enumerate(parts))]

    def at(place: int) -> tuple[int, int] | None:
        """Which piece of text a place is in; none where it is amid a placeholder."""
        texts = range(0, len(parts), 2)
        return next(((i, place - starts[i]) for i in texts if starts[i] <= place <= starts[i + 1]), None)

    found = [(at(start), at(end), index) for start, end, index in spans]
    return _Plan(pieces, found, list(recorder.guards)) if all(a and b for a, b, _ in found) else None
