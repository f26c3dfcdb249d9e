"""Which model and which tokenizer."""

from dataclasses import dataclass
from typing import Literal

from ftlib.config import LocalOrHub, MaybeFile


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is trained. Sizes come from its config.json, never from code."""

    path: LocalOrHub  # folder in Hugging Face layout, a Hub id `org/name` or `org/name@revision`, or `ftlib:demo/model`
    code: MaybeFile | None = None  # `my_model.py:Decoder`: your own decoder class in place of the library's
    attention: Literal["auto", "reference", "sdpa", "varlen", "flex", "flash4"] = "auto"  # attention backend


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer; by default the one in the model's folder."""

    path: LocalOrHub | None = None  # folder or file of the tokenizer; null: the model's own
    add_tokens: tuple[str, ...] = ()  # more special tokens, at the ids behind all others
