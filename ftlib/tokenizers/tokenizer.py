"""Text to ids and back, special tokens, conversations through a chat template: one interface for every file kind."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.errors import UserError
from ftlib.tokenizers.backends import Backend, JsonBackend, SentencePieceBackend, Span
from ftlib.tokenizers.files import Files, find
from ftlib.tokenizers.jinja import render
from ftlib.tokenizers.ranks import RanksBackend
from ftlib.tokenizers.spans import Rendered, render_with_spans

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|return|>")
MARKER = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<<?/?SYS>>?")


class Tokenizer:
    """Made by `from_pretrained`. `chat_template` may be set; `special_tokens` maps declared tokens to ids."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.backend = _backend(files)
        self.chat_template: str | None = files.template
        self.special_tokens = self._declared()
        known = getattr(self.backend, "named", {})
        self.names = {name: _text(files.config.get(name)) or known.get(name) for name in NAMED}
        self.bos_id, self.eos_id, self.pad_id = (self._id(name) for name in ("bos", "eos", "pad"))
        self._warned = False
        self._added: dict[str, int] = {}
        self._index()

    def _index(self) -> None:
        self._names = {i: token for token, i in self.special_tokens.items()}
        tokens = sorted(self.special_tokens, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Declare more special tokens; returns the ids of those that are new, behind all others.

        A model needs `vocab_size` embedding rows then (ftlib.models.resize).
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self.special_tokens]
        if not all(new):
            raise UserError("an empty text cannot be a token", where="tokenizer.add_tokens")
        ids = {token: self.vocab_size + i for i, token in enumerate(new)}
        if ids and isinstance(self.backend, JsonBackend):
            self.backend.add(ids)
        self.special_tokens |= ids
        self._added |= ids
        self._index()
        return list(ids.values())

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the highest id + 1."""
        return max([self.backend.size, *(i + 1 for i in self.special_tokens.values())])

    @property
    def filler_id(self) -> int:
        """An id for padding, which nothing reads: the pad token, else unknown, else 0; never EOS, which is trained."""
        known = (self.pad_id, self.special_tokens.get(self.names["unk_token"] or ""))
        return next((i for i in known if i is not None and i != self.eos_id), 0)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, those generation_config.json lists, and the known ends of a turn."""
        listed = self.files.generation.get("eos_token_id", self.files.model.get("eos_token_id"))
        ids = {self.eos_id, *(listed if isinstance(listed, list) else [listed])}
        ids |= {self.special_tokens.get(token) for token in TURN_ENDS}
        return frozenset(i for i in ids if isinstance(i, int))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text becomes."""
        digest = hashlib.sha256(self.files.main.read_bytes())
        digest.update(str(getattr(self.backend, "prefix", None)).encode())
        if self.files.merges:
            digest.update(self.files.merges.read_bytes())
        digest.update(repr((sorted(self.special_tokens.items()), self.chat_template, self.names)).encode())
        return digest.hexdigest()

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. `special`: declared special tokens in it are matched; false: they are text like any other."""
        ids = self.encode_with_offsets(text, special)[0]
        if bos:
            ids = [self._needed("bos"), *ids] if not ids or ids[0] != self.bos_id else ids
        return [*ids, self._needed("eos")] if eos else ids

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[Span]]:
        """Ids, and the characters [start, end) of `text` each came from; bytes of one character share its span."""
        if not special:
            return self.backend.encode_plain(text)
        if self.backend.matches_added or self._split is None:
            return self.backend.encode(text)  # the library cuts at special tokens itself, or there are none
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for match in [*self._split.finditer(text), None]:
            end = match.start() if match else len(text)
            if end > at:
                found, places = self.backend.encode(text[at:end], at == 0)
                ids += found
                spans += [(start + at, stop + at) for start, stop in places]
            if match:
                ids.append(self.special_tokens[match.group()])
                spans.append(match.span())
                at = match.end()
        return ids, spans

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ids. Special tokens are written out, or left out with `skip_special`."""
        if self.backend.matches_added:
            return self.backend.decode(list(ids), frozenset(self._names) if skip_special else frozenset())
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and i not in self._names:
                run.append(i)
                continue
            text += self.backend.decode(run, frozenset()) if run else ""
            run = []
            if i is not None and not skip_special:
                text += self._names[i]
        return text

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as ids, or as text with `tokenize=False`. The template writes BOS itself; none is added."""
        variables = self._variables(tools, variables) | {"add_generation_prompt": add_generation_prompt}
        text, _ = render(self._template(), messages, variables)
        return self.encode(text) if tokenize else text

    def render_with_spans(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        roles: tuple[str, ...] = ("assistant",),
        **variables: Any,
    ) -> Rendered:
        """A conversation as text, and the characters its assistants (or `roles`) wrote, terminators included."""
        return render_with_spans(self._template(), messages, self._variables(tools, variables), roles)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, with the chat template in use, for us and for transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (self.files.main, self.files.merges, *self.files.companions):
            if file is not None and file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        if self._added:
            self._save_added(folder)
        if self.chat_template is not None and self.chat_template != self.files.template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def _save_added(self, folder: Path) -> None:
        if isinstance(self.backend, JsonBackend):
            (folder / self.files.main.name).unlink(missing_ok=True)
            (folder / "tokenizer.json").write_text(self.backend.content(), encoding="utf-8")
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        entry = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        declared = {str(i): {"content": token, **entry} for token, i in self._added.items()}
        config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **declared}
        file.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")

    def _template(self) -> str:
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template", where="data.template", fix="name one: data.template=chatml"
            )
        if not self._warned:
            self._warned = True
            missing = {m for m in MARKER.findall(self.chat_template) if len(self.encode(m)) > 1}
            if missing:
                named = ", ".join(sorted(missing))
                warnings.warn(f"the tokenizer has no token for {named}: encoded as text", stacklevel=3)
        return self.chat_template

    def _variables(self, tools: list[dict] | None, variables: dict[str, Any]) -> dict[str, Any]:
        known = {name: token for name, token in self.names.items() if token is not None}
        return {"bos_token": "", "eos_token": "", **known, "tools": tools, "documents": None, **variables}

    def _declared(self) -> dict[str, int]:
        """Special and added tokens with their ids, wherever the files declare them."""
        found: dict[str, int] = dict(getattr(self.backend, "added", {}))
        for i, entry in self.files.config.get("added_tokens_decoder", {}).items():
            found[_text(entry)] = int(i)
        for name in NAMED:
            token = _text(self.files.config.get(name))
            if token is not None and token not in found and (i := self.backend.token_id(token)) is not None:
                found[token] = i
        return found

    def _id(self, which: str) -> int | None:
        token = self.names[f"{which}_token"]
        if token is not None:
            return self.special_tokens.get(token, self.backend.token_id(token))
        if isinstance(self.backend, SentencePieceBackend):
            found = getattr(self.backend.model, f"{which}_id")()
            if found >= 0:
                self.names[f"{which}_token"] = self.backend.model.id_to_piece(found)
                return found
        listed = self.files.model.get(f"{which}_token_id")
        return listed[0] if isinstance(listed, list) else listed

    def _needed(self, which: str) -> int:
        found = self.bos_id if which == "bos" else self.eos_id
        if found is None:
            raise UserError(f"the tokenizer has no {which.upper()} token", where=str(self.files.main))
        return found


def from_pretrained(path: str | Path) -> Tokenizer:
    """The tokenizer in a model folder, or of a single file: tokenizer.json, sentencepiece model, tiktoken ranks."""
    return Tokenizer(find(Path(path)))


def _backend(files: Files) -> Backend:
    if files.kind == "json":
        return JsonBackend(files.main.read_text(encoding="utf-8"), files.main)
    if files.kind == "vocab":
        return JsonBackend.from_vocab(files.main, files.merges)
    if files.kind == "sentencepiece":
        return SentencePieceBackend(files.main, _prefix(files.config))
    return RanksBackend(files.main)


def _prefix(config: dict[str, Any]) -> str | None:
    """Where transformers lets this model's texts begin with a space (SentencePieceBackend)."""
    if "legacy" not in config and "Llama" not in str(config.get("tokenizer_class")):
        return None
    return "always" if config.get("legacy") else "first"


def _text(entry: Any) -> str | None:
    """A token as the files write it: text, or an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
