"""Example -> token ids and the mask of trained tokens, exact by construction: the template says who wrote what."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ftlib.data.examples import Example
from ftlib.errors import UserError


class Tokenizer(Protocol):
    """What this room asks of a tokenizer (ftlib.tokenizers)."""

    bos_id: int | None
    eos_id: int | None
    chat_template: str | None

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]: ...

    def render_with_spans(self, messages: list[dict], tools: list[dict] | None = None) -> Any: ...


def tokenize(example: Example, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids int32 [n], trained bool [n]) of one row. UserError, naming the row, if the template refuses it."""
    try:
        if example.text is not None:
            return _text(example.text, tokenizer)
        return _conversation(example, tokenizer)
    except UserError as error:
        where = f"{example.where} ({error.where})" if error.where else example.where
        raise UserError(error.what, where=where, fix=error.fix) from None
    except UnicodeEncodeError as error:
        what = f"the text holds half a character (a lone surrogate, {error.object[error.start]!a})"
        raise UserError(what, where=example.where, fix="mend or remove this row") from None


def _text(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All of it trained, between BOS and EOS; a text that brings its own gets no second one."""
    ids, _ = tokenizer.encode_with_offsets(text)
    ids = list(ids)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids.append(tokenizer.eos_id)
    return np.array(ids, np.int32), np.ones(len(ids), bool)


def _conversation(example: Example, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A token is trained if it overlaps characters that a trained message wrote. The template brings BOS and EOS."""
    rendered = tokenizer.render_with_spans(example.messages, tools=example.tools)
    ids, offsets = tokenizer.encode_with_offsets(rendered.text)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(ids), bool)
    for start, end in _trained_spans(example, rendered):
        trained |= (starts < end) & (ends > start)
    return np.array(ids, np.int32), trained


def _trained_spans(example: Example, rendered: Any) -> Iterator[tuple[int, int]]:
    for span in rendered.spans:
        trained = example.trained[span.message_index]
        if trained is True:
            yield span.start, span.end
        elif trained:
            yield from _parts(span, rendered.text, example.messages[span.message_index]["content"], trained)


def _parts(span: Any, text: str, content: str, trained: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Trained ranges of a message's content, where it stands in the rendered text. What the template writes before the
    content goes with the first character, its terminator with the last."""
    kept = content.strip()  # many templates trim
    at = text.find(kept, span.start, span.end)
    if at < 0:
        raise UserError(
            f"message {span.message_index + 1} has weights for its parts, but the chat template rewrites its content",
            fix="weigh the whole message, or use a template that keeps its text",
        )
    shift = at - content.index(kept)
    for start, end in trained:
        begins, ends = start == 0, end == len(content)
        yield span.start if begins else start + shift, span.end if ends else end + shift
