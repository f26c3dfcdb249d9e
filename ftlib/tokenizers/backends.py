"""The libraries that cut text into tokens, behind one small interface: ids with the characters each came from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftlib.errors import UserError
from ftlib.tokenizers.cut import ByteLengths, Cut, Span, SpanCut, is_bytewise

FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}  # when added


class Backend(Protocol):
    """What a tokenizer needs of a library. Special tokens are the caller's business unless `matches_added` is true."""

    size: int  # highest id + 1
    matches_added: bool  # `encode` finds the declared added tokens itself

    def encode(self, text: str, first: bool = True) -> tuple[list[int], list[Span]]: ...
    def encode_plain(self, text: str) -> tuple[list[int], list[Span]]: ...
    def decode(self, ids: list[int], skip: frozenset[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...


class JsonBackend:
    """tokenizer.json of any kind, and GPT-2's vocabulary and merges, through the `tokenizers` library."""

    matches_added = True

    def __init__(self, content: str, where: Path) -> None:
        from tokenizers import Tokenizer

        try:
            settings = json.loads(content)
            self._original = json.loads(content)
            # A file may remember how it was last used: no text is cut, filled up or put between BOS and EOS here.
            settings |= {"truncation": None, "padding": None, "post_processor": None}
            for part in ("pre_tokenizer", "decoder"):
                _keep_spaces(settings.get(part))
            self._content = settings
            self.tokenizer = Tokenizer.from_str(json.dumps(settings))
        except Exception as error:
            what = f"the tokenizer cannot be read: {error}"
            raise UserError(what, where=str(where), fix="copy or download it again") from None
        listed = settings.get("added_tokens", ())
        self.added = {token["content"]: token["id"] for token in listed}
        self.visible = {token["id"] for token in listed if not token.get("special")}
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocab.values()) + 1
        self._plain: Tokenizer | None = None
        self._lengths: ByteLengths | None = None  # made when first needed

    @classmethod
    def from_vocab(cls, vocab: Path, merges: Path) -> "JsonBackend":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            built = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:
            what = f"the vocabulary cannot be read: {error}"
            raise UserError(what, where=str(vocab), fix="copy or download it again") from None
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        return cls(built.to_str(), vocab)

    def encode(self, text: str, first: bool = True) -> tuple[list[int], list[Span]]:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[Cut]:
        if not is_bytewise(self._content):
            found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [SpanCut(one.ids, one.offsets) for one in found]
        if self._lengths is None:
            self._lengths = ByteLengths(self._content, self.size, self.tokenizer.get_vocab(with_added_tokens=False))
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        cuts = (self._lengths.cut(text, one.ids) for text, one in zip(texts, found, strict=True))
        return [cut or SpanCut(*self.encode(text)) for text, cut in zip(texts, cuts, strict=True)]

    def encode_plain(self, text: str) -> tuple[list[int], list[Span]]:
        if self._plain is None:
            from tokenizers import Tokenizer

            self._plain = Tokenizer.from_str(json.dumps({**self._content, "added_tokens": []}))
        found = self._plain.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def add(self, token: str, **flags: bool) -> int:
        """One more token that is matched in texts; returns its id, which the library picks."""
        from tokenizers import AddedToken

        entry = FLAGS | flags
        self.tokenizer.add_tokens([AddedToken(token, **entry)])
        number = self.tokenizer.token_to_id(token)
        entry = {"id": number, "content": token, **entry}
        self._content["added_tokens"] = [*self._content.get("added_tokens", ()), entry]
        self.size, self._lengths = max(self.size, number + 1), None
        return number

    def content(self) -> str:
        """tokenizer.json with the tokens that were added."""
        whole = {**self._original, "added_tokens": self._content["added_tokens"]}
        return json.dumps(whole, ensure_ascii=False, indent=2)

    def decode(self, ids: list[int], skip: frozenset[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in skip], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def _keep_spaces(part: dict | None) -> None:
    """Offsets that leave out a token's leading space would lose tokens that are nothing but space."""
    if not isinstance(part, dict):
        return
    if "trim_offsets" in part:
        part["trim_offsets"] = False
    for children in ("pretokenizers", "decoders"):
        for child in part.get(children, ()):
            _keep_spaces(child)


class SentencePieceBackend:
    """A sentencepiece model; characters it spells in bytes are spans of all their byte tokens. A space that it puts in
    front of a text has the span of the first character.

    `prefix`: which parts of a text, cut at special tokens, begin with a space of the model's own. None: all, as
    sentencepiece itself does. As transformers does: `always`, or `first` of a text, and never in front of a space.
    """

    matches_added = False

    def __init__(self, path: Path, prefix: str | None = None) -> None:
        import sentencepiece

        self.prefix, self._bare = prefix, None
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"the sentencepiece model cannot be read: {error}", where=str(path)) from None
        self.size = self.model.vocab_size()
        ids = [i for i in range(self.size) if self.model.is_control(i)]
        self.controls = {self.model.id_to_piece(i): i for i in ids}
        try:
            self.model.encode("", return_type="offset_mapping")
            self._has_offsets = True
        except (TypeError, ValueError):  # sentencepiece before 0.2.3
            self._has_offsets = False

    def encode(self, text: str, first: bool = True) -> tuple[list[int], list[Span]]:
        ids, spans = self._pieces(text, self._without_prefix() if self._is_bare(text, first) else self.model)
        for i in range(len(spans) - 2, -1, -1):
            start, end = spans[i]
            if start == end:  # only the last byte of a character has its extent
                spans[i] = spans[i + 1] if self.model.is_byte(ids[i]) else (start, start + 1)
        return ids, spans

    def _is_bare(self, text: str, first: bool) -> bool:
        return self.prefix is not None and (text[:1] in (" ", "▁") or (self.prefix == "first" and not first))

    def _without_prefix(self) -> Any:
        if self._bare is None:
            import sentencepiece

            # Protocol buffers merge what comes twice: normalizer_spec (3) with add_dummy_prefix (3) = false.
            proto = self.model.serialized_model_proto() + b"\x1a\x02\x18\x00"
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto)
        return self._bare

    def _pieces(self, text: str, model: Any) -> tuple[list[int], list[Span]]:
        if self._has_offsets:
            found = model.encode(text, return_type="offset_mapping")
            return list(found["ids"]), [tuple(span) for span in found["offsets"]]
        pieces = model.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def encode_plain(self, text: str) -> tuple[list[int], list[Span]]:
        return self.encode(text)

    def decode(self, ids: list[int], skip: frozenset[int]) -> str:
        return self.model.decode([i for i in ids if i not in skip and i < self.size])

    def token_id(self, token: str) -> int | None:
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None
