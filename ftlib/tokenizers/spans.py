"""Which characters of a rendered conversation its assistants wrote, exactly, or an error: nothing here is guessed."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ftlib.errors import UserError
from ftlib.tokenizers.jinja import Event, Rendering, render
from ftlib.tokenizers.trail import UNCLEAR

_MEND = "use a template that puts {% generation %} … {% endgeneration %} around what the assistant writes"
_PROBE = "Zq7vXw9K"  # stands for what an assistant says, to see what a template writes before it
_WRITTEN = ("content", "reasoning_content", "reasoning", "thinking")  # keys of a message that a template writes out

Messages = Sequence[dict[str, Any]]


class Span(NamedTuple):
    """Characters [start, end) of a rendering: what the assistant of messages[message_index] wrote, and its end."""

    start: int
    end: int
    message_index: int


class Rendered(NamedTuple):
    """A conversation as text, and its assistants' spans in order."""

    text: str
    spans: list[Span]


def render_with_spans(
    template: str, messages: Messages, variables: dict[str, Any], roles: tuple[str, ...] = ("assistant",)
) -> Rendered:
    """Render once and tell the spans of the assistants, or of other `roles` too.

    {% generation %} blocks are the assistants' spans, where a template has them. Else a span is what was written while
    a loop stood at the message, without the header that the template also writes as the prompt for an answer, and
    without white space at its end. UserError: the template is one of which that cannot be told.
    """
    form = _Template(template, {**variables, "add_generation_prompt": False})
    text, rendering = form.render(messages)
    marks = rendering.generations > 0 and "assistant" in roles
    spans = marked(rendering, messages) if marks else []
    wanted = [i for i in _of(messages, roles) if not (marks and messages[i]["role"] == "assistant")]
    if not wanted:
        return Rendered(text, spans)
    headers = _Headers(form, messages, text)
    for index, (start, end) in _blocks(rendering.events, text, messages, wanted).items():
        start += headers.size(index, start, end)
        end = len(text[:end].rstrip())
        if start < end:
            spans.append(Span(start, end, index))
    return Rendered(text, sorted(spans))


class _Template(NamedTuple):
    """A template with all that it is rendered with, but for the messages."""

    source: str
    variables: dict[str, Any]

    def render(self, messages: Messages, prompt: bool = False) -> tuple[str, Rendering]:
        return render(self.source, messages, {**self.variables, "add_generation_prompt": prompt})


def _places(events: list[Event]) -> list[tuple[int, int, Event]]:
    """(start, end, event) of each."""
    ends = list(accumulate(len(event.text) for event in events))
    return [(end - len(event.text), end, event) for end, event in zip(ends, events, strict=True)]


def marked(rendering: Rendering, messages: Messages) -> list[Span]:
    """Spans of {% generation %} blocks."""
    found, at = [], 0
    for text, owner, generated in rendering.events:
        if generated:
            found.append((at, at + len(text), owner))
        at += len(text)
    if len(found) < rendering.generations:
        what = "a {% generation %} block of the chat template is captured (in a macro, set or filter block)"
        raise UserError(f"{what}, so its place cannot be told", where="chat template", fix=_MEND)
    unclear = any(owner < 0 for _, _, owner in found)
    if unclear and len(found) == len(assistants := _of(messages, ("assistant",))):  # in order, one each
        unclear, found = False, [(start, end, index) for (start, end, _), index in zip(found, assistants, strict=True)]
    if unclear:
        what = "the chat template does not say which message a {% generation %} block belongs to"
        raise UserError(what, where="chat template", fix="loop over the messages themselves")
    return [Span(start, end, owner) for start, end, owner in found if end > start]


def _blocks(events: list[Event], text: str, messages: Messages, wanted: list[int]) -> dict[int, tuple[int, int]]:
    """For each of the wanted messages that is written: [start, end) of all that was written for it."""
    runs: dict[int, list[tuple[int, int]]] = {index: [] for index in wanted}
    before = None
    for start, end, event in _places(events) if wanted else ():
        if event.owner == UNCLEAR and event.text.strip():
            raise UserError(
                "the chat template joins or rewrites assistants' messages, so which wrote what cannot be told",
                where="chat template",
                fix=f"join neighbouring messages of one role in the data, or {_MEND}",
            )
        if event.owner in runs:
            found = runs[event.owner]
            if event.owner == before:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        before = event.owner
    blocks = {}
    for index, found in runs.items():
        block = _one(index, [run for run in found if text[slice(*run)].strip()])
        _check_whole(index, messages[index], text, block)
        if block:
            blocks[index] = block
    return blocks


def _one(index: int, runs: list[tuple[int, int]]) -> tuple[int, int] | None:
    if len(runs) > 1:
        what = (
            f"the chat template writes message {index + 1} in {len(runs)} places; which the assistant writes is unclear"
        )
        raise UserError(what, where="chat template", fix=_MEND)
    return runs[0] if runs else None


def _check_whole(index: int, message: dict[str, Any], text: str, block: tuple[int, int] | None) -> None:
    """What an assistant says must not stand outside its block. A template may leave it out or rewrite it."""
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else ""
    inside = text[slice(*block)] if block else ""
    if said and said not in inside and said in text and (not block or said in text[block[1] :]):
        raise UserError(
            f"the chat template writes message {index + 1} outside of a loop over messages: its place cannot be told",
            where="chat template",
            fix=_MEND,
        )


class _Headers:
    """What a template writes before an assistant's own words, such as `<|im_start|>assistant`."""

    def __init__(self, form: _Template, messages: Messages, text: str) -> None:
        self._form, self._messages, self._text = form, messages, text
        self._prompted = ""  # a header that is known to be part of the prompt for an answer

    def size(self, index: int, start: int, end: int) -> int:
        """Characters of the header of message `index`, whose block is text[start:end]."""
        block = self._text[start:end]
        spoken = self._messages[index]["role"] == "assistant"
        if spoken and self._prompted and block.startswith(self._prompted):
            return len(self._prompted)
        prompt = self._prompt(index) if spoken else None
        if prompt is not None and start < len(prompt) <= end and self._text.startswith(prompt):
            self._prompted = self._text[start : len(prompt)]
            return len(self._prompted)
        return self._probed(index, block)

    def _prompt(self, index: int) -> str | None:
        """What a model is given to answer messages[:index]; None if the template cannot write that."""
        try:
            return self._form.render(self._messages[:index], prompt=True)[0]
        except UserError:
            return None

    def _probed(self, index: int, block: str) -> int:
        """The header as it stands before other words of the same message. White space alone is no header: no prompt
        ends in it, so a model writes it."""
        message = self._messages[index]
        plain = {"role": message["role"], "content": _PROBE}
        same = plain | {key: _PROBE for key in _WRITTEN if isinstance(message.get(key), str) and message[key].strip()}
        for probe in (same, plain):
            for rest in (self._messages[index + 1 :], ()):
                header = self._header_of([*self._messages[:index], probe, *rest], index)
                if header is not None and (not header.strip() or block.startswith(header)):
                    return len(header) if header.strip() else 0
        raise UserError(
            f"where the assistant's own words begin in message {index + 1} cannot be told from the chat template",
            where="chat template",
            fix=f"write the header under add_generation_prompt too, or {_MEND}",
        )

    def _header_of(self, messages: Messages, index: int) -> str | None:
        try:
            text, rendering = self._form.render(messages)
            start, end = _blocks(rendering.events, text, messages, [index]).get(index, (0, 0))
        except UserError:
            return None
        header, found, _ = text[start:end].partition(_PROBE)
        return header if found else None


def _of(messages: Messages, roles: Sequence[str]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") in roles]
