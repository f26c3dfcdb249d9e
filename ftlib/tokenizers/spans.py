"""Which characters of a rendered conversation an assistant wrote, from the template itself."""

from typing import Any, NamedTuple

from ftlib.errors import UserError
from ftlib.tokenizers.jinja import UNKNOWN, Trace, render


class Span(NamedTuple):
    """Characters [start, end) of a rendering, written by the assistant in messages[message_index]."""

    start: int
    end: int
    message_index: int


class Rendered(NamedTuple):
    """A conversation as text, and its assistants' spans in order: content and terminator, without the turn's header."""

    text: str
    spans: list[Span]


def render_with_spans(
    template: str, messages: list[dict], variables: dict[str, Any], roles: tuple[str, ...] = ("assistant",)
) -> Rendered:
    """Render once and tell the assistants' parts, or those of other `roles` too: content and what ends the turn.

    A template that marks them with {% generation %} says itself what is trained. Any other is traced: an assistant's
    part is what was written while the loop over the messages stood at it, less the header that the template writes as
    its generation prompt, and less white space behind the terminator. UserError where that cannot be told.
    """
    variables = {**variables, "add_generation_prompt": False}
    text, trace = render(template, messages, variables)
    others = _of_roles(text, trace, messages, set(roles) - {"assistant"})
    if "assistant" not in roles:
        return Rendered(text, others)
    if trace.generation:
        return Rendered(text, sorted([*_marked(trace, messages), *others]))
    prompt = _generation_prompt(template, messages, variables)
    spans = []
    for start, end, index in sorted(trace.written):
        if index == UNKNOWN:
            raise UserError(
                "the chat template rewrites messages, so its output cannot be traced back to them",
                where="data.template",
                fix="put {% generation %} … {% endgeneration %} around what the assistant writes",
            )
        if messages[index].get("role") == "assistant":
            block = text[start:end]
            head, body = _header(block, prompt, messages[index]), len(block.rstrip())
            if head < body:
                spans.append(Span(start + head, start + body, index))
    assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and _says(message)]
    if missing := set(assistants) - {span.message_index for span in spans}:
        raise UserError(
            f"the chat template writes nothing that could be traced to message {min(missing) + 1}",
            where="data.template",
            fix="put {% generation %} … {% endgeneration %} around what the assistant writes",
        )
    return Rendered(text, sorted([*spans, *others]))


def _of_roles(text: str, trace: Trace, messages: list[dict], roles: set[str]) -> list[Span]:
    """Spans of messages of these roles where their content stands in what was written for them."""
    spans = []
    for start, end, index in trace.written:
        if index == UNKNOWN or messages[index].get("role") not in roles:
            continue
        content = messages[index].get("content")
        at = text.find(content.strip(), start, end) if isinstance(content, str) and content.strip() else -1
        if at >= 0:
            spans.append(Span(at, start + len(text[start:end].rstrip()), index))
    return spans


def _marked(trace: Trace, messages: list[dict]) -> list[Span]:
    """Spans of {% generation %} blocks; one outside a loop over the messages belongs to the assistants in order."""
    assistants = iter([i for i, message in enumerate(messages) if message.get("role") == "assistant"])
    spans = []
    for start, end, index in trace.generation:
        known = index is not None and index != UNKNOWN
        spans.append(Span(start, end, index if known else next(assistants, len(messages) - 1)))
    return [span for span in spans if span.end > span.start]


def _generation_prompt(template: str, messages: list[dict], variables: dict[str, Any]) -> str:
    """What the template writes to make the assistant speak; empty if it writes nothing."""
    last_user = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=len(messages) - 1)
    head = messages[: last_user + 1]
    try:
        without, _ = render(template, head, variables)
        with_prompt, trace = render(template, head, {**variables, "add_generation_prompt": True})
    except UserError:
        return ""  # a template that wants whole conversations has no use for a prompt
    if with_prompt.startswith(without):
        return with_prompt[len(without) :]
    return with_prompt[max((end for _, end, _ in trace.written), default=len(with_prompt)) :]


def _header(block: str, prompt: str, message: dict) -> int:
    """Characters of `block` that the generation prompt already says: their common beginning, short of the content."""
    # A template may write what separates two turns as part of the prompt.
    common = max(_common(block, prompt), _common(block, prompt.lstrip()))
    texts = [message.get("reasoning_content"), message.get("content")]
    places = [block.find(text.strip()) for text in texts if isinstance(text, str) and text.strip()]
    return min([common, *(place for place in places if place >= 0)])


def _common(a: str, b: str) -> int:
    """Length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _says(message: dict) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)
