"""A text cut into tokens, asked which of them overlap some of its characters."""

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

Span = tuple[int, int]  # characters [start, end) of the text a token came from


class Cut(Protocol):
    """`ids` of the tokens, int [n]."""

    ids: Sequence[int] | np.ndarray

    def between(self, start: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that overlap the characters [start, end); none where there are no characters."""
        ...


class SpanCut:
    """From the characters of each token: both numbers of `spans` never fall from token to token."""

    def __init__(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        self.ids, self._spans = ids, spans

    def between(self, start: int, end: int) -> tuple[int, int]:
        first = bisect_right(self._spans, start, key=itemgetter(1))
        return first, first if start >= end else max(first, bisect_left(self._spans, end, key=itemgetter(0)))


class ByteCut:
    """From the bytes of the text up to and with each token: `ends` int64 [n]. `ids` int32 [n]."""

    def __init__(self, text: str, ids: np.ndarray, ends: np.ndarray) -> None:
        self.ids, self._text, self._ends = ids, text, ends

    def between(self, start: int, end: int) -> tuple[int, int]:
        if not self._text.isascii():
            start, end = (len(self._text[:at].encode()) for at in (start, end))
        first = int(self._ends.searchsorted(start, "right"))
        if start >= end:
            return first, first
        # The last token that overlaps is the first that reaches `end`.
        return first, min(int(self._ends.searchsorted(end, "left")) + 1, len(self.ids))


class ByteLengths:
    """How many bytes of a text each token of a byte-level vocabulary is, which gives places without the library's
    search for characters (a fifth of its time)."""

    def __init__(self, settings: Mapping[str, Any], size: int, vocab: Mapping[str, int]) -> None:
        self._normalized = settings.get("normalizer") is not None
        self._of = np.zeros(size, np.int64)
        for token, number in vocab.items():
            self._of[number] = len(token)  # a byte is written as one character
        for token in settings.get("added_tokens", ()):
            self._of[token["id"]] = len(token["content"].encode())

    def cut(self, text: str, ids: Sequence[int]) -> ByteCut | None:
        """None where the tokens are not all of the text, byte for byte."""
        if self._normalized and not unicodedata.is_normalized("NFC", text):
            return None
        array = np.array(ids, np.int32)
        ends = self._of[array].cumsum()
        size = len(text) if text.isascii() else len(text.encode())
        return ByteCut(text, array, ends) if len(ends) and ends[-1] == size else None


def is_bytewise(settings: Mapping[str, Any]) -> bool:
    """Whether tokens of such a tokenizer.json are the bytes of a text in their order: byte-level BPE and no change of
    the text but NFC. Whether that holds of one text, `ByteLengths.cut` sees."""
    model, normalizer = settings.get("model") or {}, settings.get("normalizer") or {"type": "NFC"}
    steps = settings.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    affixes = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token"))
    return (
        model.get("type", "BPE") == "BPE"
        and normalizer.get("type") == "NFC"
        and not affixes
        and not any(step.get("add_prefix_space") for step in steps)
        and not any(token.get("lstrip") or token.get("rstrip") for token in settings.get("added_tokens", ()))
        and [step.get("type") for step in steps].count("ByteLevel") == 1
        and all(_keeps(step) for step in steps)
    )


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves all of the text where it is."""
    kind = step.get("type")
    return kind in ("ByteLevel", "Digits") or (kind == "Split" and step.get("behavior") != "Removed")
