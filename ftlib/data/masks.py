"""Example -> token ids and the mask of trained tokens, exact by construction: the template says who wrote what.

A mask is bool, or float32 where a row has weights other than 0 and 1: how much each token counts.
"""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ftlib.data import thinking
from ftlib.data.examples import Example, Ranges
from ftlib.errors import UserError
from ftlib.tokenizers.cut import Cut, SpanCut
from ftlib.tokenizers.tokenizer import check_characters

_MARKER = re.compile(r"<\|[^|<>]+\|>|</s>|<(?:end|start)_of_turn>|<｜[^｜]+｜>|\[/?[A-Z_]+\]")


class Tokenizer(Protocol):
    """What this room asks of a tokenizer (ftlib.tokenizers)."""

    bos_id: int | None
    eos_id: int | None
    chat_template: str | None

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]: ...

    def render_with_spans(self, messages: list[dict], tools: list[dict] | None = None) -> Any: ...


End = Literal["all", "last", "none"]
Masked = tuple[np.ndarray, np.ndarray]


@dataclass(slots=True)
class _Text:
    """What is to be cut into tokens, and what makes ids and mask of these."""

    text: str
    finish: Callable[[Cut], Masked]


class _Span(NamedTuple):
    """Characters that are trained, how much they count, and whether an EOS is missing behind them."""

    start: int
    end: int
    open_end: bool
    weight: bool | float


def tokenize(example: Example, tokenizer: Tokenizer, train_on_end: End = "all") -> Masked:
    """(input_ids int32 [n], mask [n]) of one row. UserError, naming the row, if the template refuses it."""
    found = next(iter(tokenize_all([example], tokenizer, train_on_end)))
    if isinstance(found, UserError):
        raise found
    return found


def tokenize_all(
    examples: Sequence[Example], tokenizer: Tokenizer, train_on_end: End = "all"
) -> list[Masked | UserError]:
    """The same of many rows, in their order, or what is wrong with them: each step for all, which is faster."""
    with _without_collection():
        return _tokenize_all(examples, tokenizer, train_on_end)


def _tokenize_all(
    examples: Sequence[Example], tokenizer: Tokenizer, train_on_end: End
) -> list[Masked | UserError]:
    made = [_guarded(example, _prepared, example, tokenizer, train_on_end) for example in examples]
    texts = [one.text for one in made if isinstance(one, _Text)]
    encode = getattr(tokenizer, "encode_batch", None)
    cuts = iter(encode(texts) if encode else [SpanCut(*tokenizer.encode_with_offsets(text)) for text in texts])
    return [
        _guarded(example, one.finish, next(cuts)) if isinstance(one, _Text) else one
        for example, one in zip(examples, made, strict=True)
    ]


@contextmanager
def _without_collection() -> Iterator[None]:
    """No search for garbage among the many small objects of some rows, which are gone when it is allowed again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _guarded(example: Example, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or its UserError with the row named."""
    try:
        return function(*arguments)
    except UserError as error:
        where = f"{example.where} ({error.where})" if error.where else example.where
        return UserError(error.what, where=where, fix=error.fix)


def _prepared(example: Example, tokenizer: Tokenizer, train_on_end: End) -> "_Text | Masked":
    if example.ids is not None:
        known, most = getattr(tokenizer, "vocab_size", 1 << 31), max(example.ids, default=0)
        if most >= known:
            what = f"token {most:,} is none of this tokenizer, which has {known:,}"
            raise UserError(what, fix="take the tokenizer that the rows were made with")
        return np.array(example.ids, np.int32), np.array(example.trained_ids, bool)
    if example.messages is not None:
        made = _conversation(example, tokenizer, train_on_end)
    else:
        segments = [(example.text, True)] if example.text is not None else example.segments
        made = _segments(segments, tokenizer, example.closed or example.text is not None)
    check_characters(made.text)
    return made


def _segments(segments: list[tuple[str, bool | float]], tokenizer: Tokenizer, closed: bool) -> _Text:
    """Text side by side. `closed`: between BOS and a trained EOS; a text that brings its own gets no second one."""

    def finish(cut: Cut) -> Masked:
        weights, at = [weight for _, weight in segments], 0
        trained = _mask(len(cut.ids), weights)
        for text, weight in segments:
            _mark(trained, *cut.between(at, at + len(text)), weight)
            at += len(text)
        ids = np.asarray(cut.ids, np.int32)
        if all(weights):
            trained[trained == 0] = max(weights)  # a token without characters is one too
        if closed and tokenizer.bos_id is not None and ids[:1].tolist() != [tokenizer.bos_id]:
            ids, trained = np.insert(ids, 0, tokenizer.bos_id), np.insert(trained, 0, trained[:1].all())
        if closed and tokenizer.eos_id is not None and ids[-1:].tolist() != [tokenizer.eos_id]:
            ids, trained = np.append(ids, np.int32(tokenizer.eos_id)), np.append(trained, True)
        return ids, trained

    return _Text("".join(text for text, _ in segments), finish)


def _conversation(example: Example, tokenizer: Tokenizer, train_on_end: End) -> _Text:
    """A token is trained if it overlaps characters that a trained message wrote. The template brings BOS and EOS."""
    asked = {m["role"] for m, trained in zip(example.messages, example.trained, strict=True) if trained}
    others = sorted(asked - {"assistant"})
    roles = {"roles": ("assistant", *others)} if others else {}
    rendered = tokenizer.render_with_spans(example.messages, tools=example.tools, **roles)
    _check_calls(example, rendered)
    example.unwritten = thinking.unwritten(example.messages, rendered)
    spans = list(_trained_spans(example, rendered, tokenizer, train_on_end))

    def finish(cut: Cut) -> Masked:
        ids, last = np.asarray(cut.ids, np.int32), 0
        trained = _mask(len(cut.ids), [span.weight for span in spans])
        for span in spans:
            first, last = cut.between(span.start, span.end)
            _mark(trained, first, last, span.weight)
        if spans and spans[-1].open_end:  # the template leaves the end to whoever speaks next, or writes no token there
            # White space that followed would stand between the answer and its end.
            ids = np.append(ids[:last], np.int32(_end(tokenizer)))
            trained = np.append(trained[:last], trained.dtype.type(spans[-1].weight))
        return ids, trained

    return _Text(rendered.text, finish)


def _mask(count: int, weights: Sequence[bool | float]) -> np.ndarray:
    return np.zeros(count, bool if all(weight in (0, 1) for weight in weights) else np.float32)


def _mark(mask: np.ndarray, first: int, last: int, weight: bool | float) -> None:
    """Tokens `first` to `last` count `weight`; one that two pieces of text share counts as the larger of theirs."""
    if mask.dtype == bool:
        mask[first:last] |= bool(weight)
    else:
        np.maximum(mask[first:last], np.float32(weight), out=mask[first:last])


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError(
            "the chat template ends an answer with no token, and the tokenizer has no EOS to put there",
            where="data.template",
            fix="declare its marker: tokenizer.add_tokens=['<|im_end|>'], or take another template",
        )
    return tokenizer.eos_id


def _check_calls(example: Example, rendered: Any) -> None:
    """UserError where a template leaves an assistant's calls out, as those without tools do."""
    for span in rendered.spans:
        calls = example.messages[span.message_index].get("tool_calls") or ()
        names = [call.get("function", call).get("name") for call in calls if isinstance(call, dict)]
        lost = next((name for name in names if str(name) not in rendered.text[span.start : span.end]), None)
        if lost is not None:
            raise UserError(
                f"message {span.message_index + 1} calls {lost!r}, which the chat template does not write",
                where="data.template",
                fix="take a template that writes calls, such as chatml",
            )


def _is_token(marker: str, tokenizer: Tokenizer) -> bool:
    return marker in getattr(tokenizer, "special_tokens", {}) or len(tokenizer.encode_with_offsets(marker)[0]) == 1


def _trained_spans(
    example: Example, rendered: Any, tokenizer: Tokenizer, train_on_end: End
) -> Iterator[_Span]:
    """What is trained, in the order of the text."""
    spans = [span for span in rendered.spans if example.trained[span.message_index]]
    missing = {i for i, t in enumerate(example.trained) if t} - {span.message_index for span in spans}
    if missing:
        role = example.messages[min(missing)]["role"]
        raise UserError(
            f"message {min(missing) + 1} ({role}) is trained on, but the chat template does not show where it stands",
            fix="leave the role out of data.train_on, or take another data.template",
        )
    for number, span in enumerate(spans):
        message, wanted = example.messages[span.message_index], example.trained[span.message_index]
        content_end = _content_end(rendered.text, span, message)
        end, open_end = span.end, False
        if not rendered.text[content_end : span.end].strip() and message["role"] == "assistant":
            end, open_end = _next_marker(rendered.text, span, tokenizer)
        if train_on_end == "none" or (train_on_end == "last" and number < len(spans) - 1):
            end, open_end = content_end, False
        marker = _MARKER.match(rendered.text[content_end:end].lstrip())
        if marker and not rendered.text[end:].strip() and not _is_token(marker.group(), tokenizer):
            open_end = True  # it is text: a model would go on behind it
        if not isinstance(wanted, list):
            yield _Span(span.start, end, open_end, wanted)
            continue
        for start, stop, closes, weight in _parts(span, rendered.text, message["content"], wanted):
            yield _Span(start, end if closes else stop, open_end and closes, weight)


def _content_end(text: str, span: Any, message: dict[str, Any]) -> int:
    """Where the terminator of a turn begins: behind its content, or the last marker of a turn that ends in calls."""
    content = (message.get("content") or "").strip()
    at = text.rfind(content, span.start, span.end) if content else -1
    if at >= 0 and not message.get("tool_calls"):
        return at + len(content)
    markers = [m for m in _MARKER.finditer(text, span.start, span.end) if not text[m.end() : span.end].strip()]
    return markers[-1].start() if markers else span.end


def _next_marker(text: str, span: Any, tokenizer: Tokenizer) -> tuple[int, bool]:
    """The end of a turn whose span has no terminator: through the marker that follows; (…, True) if the text ends."""
    rest = text[span.end :]
    if not rest.strip():
        return span.end, True
    blank = len(rest) - len(rest.lstrip())
    declared = getattr(tokenizer, "special_tokens", {})
    found = [token for token in declared if rest.startswith(token, blank)]
    marker = _MARKER.match(rest, blank)
    length = max([len(token) for token in found] + [len(marker.group()) if marker else 0])
    if not length:
        raise UserError(
            "the chat template writes nothing that ends an assistant's turn, so a model could not learn to stop",
            where="data.template",
            fix="let the template write the EOS token, or a marker of the next turn, behind an answer",
        )
    return span.end + blank + length, False


def _parts(
    span: Any, text: str, content: str, trained: Ranges
) -> Iterator[tuple[int, int, bool, float]]:
    """Trained ranges of a message's content where it stands in the rendered text, whether they reach its end, and their
    weight. What the template writes before the content goes with the first character, its terminator with the last."""
    kept = content.strip()  # many templates trim
    at = text.find(kept, span.start, span.end)
    if at < 0:
        raise UserError(
            f"message {span.message_index + 1} has weights for its parts, but the chat template rewrites its content",
            fix="weigh the whole message, or use a template that keeps its text",
        )
    shift = at - content.index(kept)
    for start, end, weight in trained:
        begins, closes = start == 0, end == len(content)
        yield span.start if begins else start + shift, span.end if closes else end + shift, closes, weight
