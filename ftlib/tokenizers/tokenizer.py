"""Text to ids and back, special tokens, conversations through a chat template: one interface for every file kind."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlib.errors import UserError
from ftlib.tokenizers.backends import FLAGS, Backend, JsonBackend, SentencePieceBackend
from ftlib.tokenizers.cut import Cut, Span, SpanCut
from ftlib.tokenizers.files import ADDED, TEMPLATES, Files, find
from ftlib.tokenizers.jinja import render
from ftlib.tokenizers.ranks import RanksBackend
from ftlib.tokenizers.replay import Replay
from ftlib.tokenizers.spans import Rendered, render_with_spans
from ftlib.tokenizers.templates import Scalar, check_read, with_defaults

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|return|>")
MARKER = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<<?/?SYS>>?")


class Tokenizer:
    """Made by `from_pretrained`. `chat_template` may be set; `special_tokens` maps declared tokens to ids.

    `added`: those of `add_tokens` that were in no file, with the ids they got.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.backend = _backend(files)
        self.added: dict[str, int] = {}
        self._new: dict[str, int] = {}  # declared here, not in a file
        self._controls: dict[str, int] = getattr(self.backend, "controls", {})
        self._visible: set[int] = set(getattr(self.backend, "visible", ()))  # added, but text like any other
        known = getattr(self.backend, "named", {})
        self.names = {name: _text(files.config.get(name)) or known.get(name) for name in NAMED}
        self.special_tokens = self._declared()
        self.bos_id, self.eos_id, self.pad_id = (self._id(name) for name in ("bos", "eos", "pad"))
        self._warned = False
        self.chat_template = files.template

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations. With one, markers that a bare rank file or sentencepiece model knows
        without declaring them (`</s>`) are special tokens; without, they are text."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._chat_template = template
        self._tool_template = self.files.tool_template if template == self.files.template else None
        if template is not None:
            self.special_tokens = {**self._controls, **self.special_tokens}
        self._replay: Replay | None = None  # of this template and these names
        self._index()

    def set_template_args(self, values: Mapping[str, Scalar], where: str = "data.template_args") -> None:
        """Give variables of the chat template, such as `enable_thinking`, these values wherever it is rendered without
        others; a saved tokenizer has them too. UserError, naming `where`, for one that the template never reads."""
        if not values:
            return
        both = [template for template in (self.chat_template, self._tool_template) if template is not None]
        if not both:
            what = "the tokenizer has no chat template that could read them"
            raise UserError(what, where=where, fix="leave them out")
        check_read(values, both, where)
        whole, *tools = (with_defaults(template, values) for template in both)
        self.chat_template = whole
        self._tool_template = tools[0] if tools else None

    def _index(self) -> None:
        self._names = {i: token for token, i in self.special_tokens.items()}
        ends = {self.bos_id, self.eos_id, self.pad_id, *self.stop_ids}
        self._hidden = frozenset(i for i in self._names if i in ends or i not in self._visible)
        tokens = sorted(self.special_tokens, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Declare more special tokens; returns the ids of those that are in no file, behind all others.

        A model needs `vocab_size` embedding rows then (ftlib.models.resize).
        """
        before = len(self.added)
        for token in dict.fromkeys(tokens):
            if not token:
                raise UserError("an empty text cannot be a token", where="tokenizer.add_tokens")
            if token not in self.special_tokens:
                self._add(token)
        self._index()
        return list(self.added.values())[before:]

    def _add(self, token: str) -> None:
        known = self._controls.get(token, self.backend.token_id(token))
        number = self.vocab_size if known is None else known
        if isinstance(self.backend, JsonBackend):
            number = self.backend.add(token)
        self.special_tokens[token] = self._new[token] = number
        if known is None:
            self.added[token] = number

    def set_pad(self, token: str) -> None:
        """Fill rows up with `token`, which is added if there is none of this name."""
        self.add_tokens([token])
        if self.special_tokens[token] == self.eos_id:
            what = f"{token} ends answers: libraries that leave padding out of the loss would never train it"
            raise UserError(what, where="tokenizer.pad_token", fix="name another token; a new one is added")
        self.names["pad_token"], self.pad_id, self._replay = token, self.special_tokens[token], None
        self._new[token] = self.pad_id

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the highest id + 1."""
        return max([self.backend.size, *(i + 1 for i in (*self.special_tokens.values(), *self._controls.values()))])

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
        about = (sorted(self.special_tokens.items()), self.chat_template, self._tool_template, self.names, self.bos_id)
        digest.update(repr(about).encode())
        return digest.hexdigest()

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. `special`: declared special tokens in it are matched; false: they are text like any other."""
        ids = self.encode_with_offsets(text, special)[0]
        if bos:
            ids = [self._needed("bos"), *ids] if not ids or ids[0] != self.bos_id else ids
        return [*ids, self._needed("eos")] if eos else ids

    def encode_with_offsets(self, text: str, special: bool = True) -> tuple[list[int], list[Span]]:
        """Ids, and the characters [start, end) of `text` each came from; bytes of one character share its span."""
        check_characters(text)
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

    def encode_batch(self, texts: Sequence[str]) -> list[Cut]:
        """Texts that `check_characters` has seen as tokens, in threads where the library has some."""
        if isinstance(self.backend, JsonBackend):
            return self.backend.encode_batch(texts)
        return [SpanCut(*self.encode_with_offsets(text)) for text in texts]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ids. Special tokens are written out, or left out with `skip_special`; ids of no token are nothing."""
        if any(i < 0 for i in ids):
            raise UserError(f"{min(ids)} is no token id", fix="labels are not ids: leave out those that are -100")
        ids = [i for i in ids if i < self.vocab_size]
        if self.backend.matches_added:
            return self.backend.decode(ids, self._hidden if skip_special else frozenset())
        text, run = "", []
        for i in [*ids, None]:
            if i is not None and i not in self._names:
                run.append(i)
                continue
            text += self.backend.decode(run, frozenset()) if run else ""
            run = []
            if i is not None and not (skip_special and i in self._hidden):
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
        text, _ = render(self._template(tools), messages, variables)
        return self.encode(text) if tokenize else text

    def render_with_spans(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        roles: tuple[str, ...] = ("assistant",),
        **variables: Any,
    ) -> Rendered:
        """A conversation as text, and the characters its assistants (or `roles`) wrote, terminators included."""
        template = self._template(tools)
        if tools is not None or variables or roles != ("assistant",):
            return render_with_spans(template, messages, self._variables(tools, variables), roles)
        if self._replay is None:
            self._replay = Replay(template, self._variables(None, {}))
        return self._replay.render(messages)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, with the chat template in use, for us and for transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.chat_template == self.files.template
        for file in (self.files.main, self.files.merges, *self.files.companions):
            if file is None or (file.parent.name == TEMPLATES and not own):
                continue
            target = folder / file.relative_to(self.files.main.parent)
            if target.resolve() != file.resolve():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        if self._new:
            self._save_new(folder)
        if self.chat_template is not None and not own:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            if self._tool_template is not None:
                (folder / TEMPLATES).mkdir(exist_ok=True)
                (folder / TEMPLATES / "tool_use.jinja").write_text(self._tool_template, encoding="utf-8")

    def _save_new(self, folder: Path) -> None:
        if isinstance(self.backend, JsonBackend):
            (folder / self.files.main.name).unlink(missing_ok=True)
            (folder / "tokenizer.json").write_text(self.backend.content(), encoding="utf-8")
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        declared = {str(i): {"content": token, **FLAGS} for token, i in self._new.items()}
        config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **declared}
        if self.names["pad_token"] is not None:
            config["pad_token"] = self.names["pad_token"]
        file.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")

    def _template(self, tools: list[dict] | None) -> str:
        template = self._tool_template if tools is not None and self._tool_template else self.chat_template
        if template is None:
            raise UserError(
                "the tokenizer has no chat template", where="data.template", fix="name one: data.template=chatml"
            )
        if not self._warned:
            self._warned = True
            missing = {m for m in MARKER.findall(template) if len(self.encode(m)) > 1}
            if missing:
                named = ", ".join(sorted(missing))
                warnings.warn(f"the tokenizer has no token for {named}: encoded as text", stacklevel=3)
        return template

    def _variables(self, tools: list[dict] | None, variables: dict[str, Any]) -> dict[str, Any]:
        known = {name: token for name, token in self.names.items() if token is not None}
        return {"bos_token": "", "eos_token": "", **known, "tools": tools, "documents": None, **variables}

    def _declared(self) -> dict[str, int]:
        """Special and added tokens with their ids, wherever the files declare them."""
        found: dict[str, int] = dict(getattr(self.backend, "added", {}))
        for token, (number, flags) in _listed(self.files).items():
            if token in found:
                continue
            if isinstance(self.backend, JsonBackend):
                number = self.backend.add(token, **flags)
            found[token] = number
            if not flags["special"]:
                self._visible.add(number)
        for name in NAMED:
            token = _text(self.files.config.get(name))
            if token is not None and token not in found and (i := self.backend.token_id(token)) is not None:
                found[token] = i
        return found

    def _id(self, which: str) -> int | None:
        token = self.names[f"{which}_token"]
        if token is not None:
            found = self.special_tokens.get(token, self._controls.get(token))
            return self.backend.token_id(token) if found is None else found
        if isinstance(self.backend, SentencePieceBackend):
            found = getattr(self.backend.model, f"{which}_id")()
            if found >= 0:
                self.names[f"{which}_token"] = self.backend.model.id_to_piece(found)
                return found
        if which == "bos" and "bos_token" in self.files.config:
            return None  # null, as Qwen's: a text begins without one, whatever number config.json has for it
        listed = self.files.model.get(f"{which}_token_id")
        found = listed[0] if isinstance(listed, list) and listed else listed
        return found if isinstance(found, int) and found < self.vocab_size else None  # config.json of another's

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


def _listed(files: Files) -> dict[str, tuple[int, dict[str, bool]]]:
    """Tokens that tokenizer_config.json and added_tokens.json declare, with ids and how they are matched."""
    found = {}
    special = [_text(entry) for entry in files.config.get("additional_special_tokens") or ()]
    for token, number in files.config.get(ADDED, {}).items():
        found[token] = (number, FLAGS | {"special": token in special})
    for number, entry in files.config.get("added_tokens_decoder", {}).items():
        entry = entry if isinstance(entry, dict) else {"content": entry}
        flags = {key: bool(entry.get(key, False)) for key in FLAGS}
        found[entry.get("content")] = (number, flags)
    try:
        return {str(token): (int(number), flags) for token, (number, flags) in found.items()}
    except (TypeError, ValueError):
        what = "an id of an added token is no number"
        raise UserError(what, where=str(files.main.parent / "tokenizer_config.json"), fix="download it again") from None


def check_characters(text: str) -> None:
    """UserError for text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"the text holds half a character (a lone surrogate, {text[error.start]!a})"
        raise UserError(what, fix="mend or remove this text") from None


def _text(entry: Any) -> str | None:
    """A token as the files write it: text, or an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
