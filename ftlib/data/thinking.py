"""Reasoning in answers: as it stands, removed, or handed to the template as reasoning."""

import re

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
