"""Reasoning in answers: as it stands, removed, or handed to the template as reasoning; and whether that wrote it."""

import re
from typing import Any

from ftlib.data.examples import Example

_THOUGHT = re.compile(r"\s*<(think|thinking|reasoning)>(.*?)</\1>\s*", re.DOTALL)
FIELDS = ("reasoning_content", "reasoning", "thinking")


def apply(example: Example, mode: str) -> None:
    """`drop` removes it from answers, `split` moves it to `reasoning_content`, which templates read.

    Trained ranges of the content move with it.
    """
    if mode == "keep" or not example.messages:
        return
    for number, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        found = _THOUGHT.match(message.get("content") or "")
        if found:
            message["content"] = message["content"][found.end() :]
            if mode == "split":
                message.setdefault("reasoning_content", found.group(2).strip())
            ranges, cut = example.trained[number], found.end()
            if isinstance(ranges, list):
                example.trained[number] = [(max(s - cut, 0), e - cut, w) for s, e, w in ranges if e > cut]
        if mode == "drop":
            for field in FIELDS:
                message.pop(field, None)


def unwritten(messages: list[dict[str, Any]], rendered: Any) -> int:
    """Answers whose reasoning is not in what the template made of a conversation (its text; its spans, where known)."""
    spans = {span.message_index: span for span in rendered.spans}
    count = before = 0
    for number, message in enumerate(messages):
        span = spans.get(number)
        reasoning, content = _told(message) if message["role"] == "assistant" else ("", "")
        if reasoning:
            own = rendered.text[before : span.end] if span else rendered.text
            if content:  # the answer may hold the same words
                first, _, last = own.rpartition(content)
                own = f"{first}\0{last}"
            count += reasoning not in own
        before = span.end if span else before
    return count


def _told(message: dict[str, Any]) -> tuple[str, str]:
    """What a message reasons, and what it says."""
    content = message.get("content") or ""
    told = next((message[field] for field in FIELDS if isinstance(message.get(field), str)), "")
    if not told and "<" in content[:9] and (found := _THOUGHT.match(content)):
        told, content = found.group(2), content[found.end() :]
    return told.strip(), content.strip()
