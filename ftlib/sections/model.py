"""Which model and which tokenizer."""

from dataclasses import dataclass
from typing import Literal

from ftlib.config import LocalOrHub, MaybeFile


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is trained. Sizes come from its config.json, never from code."""

    path: LocalOrHub  # folder in Hugging Face layout, a Hub id `org/name` or `org/name@revision`, or `ftlib:demo/model`
    code: MaybeFile | None = None  # `my_model.py:Decoder`: your own decoder class in place of the library's
    quantize: Literal["nf4", "int8", "fp8"] | None = None  # the frozen matrices below an adapter, as they are loaded
    fp8: Literal["tensorwise", "rowwise"] | None = None  # products of the blocks in 8-bit floats; H100 or later
    fp8_smallest: int = 1024  # layers with fewer inputs or outputs keep their dtype: they would lose by it
    attention: Literal["auto", "reference", "sdpa", "varlen", "flex", "flash4"] = "auto"  # attention backend


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer; by default the one in the model's folder."""

    path: LocalOrHub | None = None  # folder or file of the tokenizer; null: the model's own
    add_tokens: tuple[str, ...] = ()  # tokens to learn: new ones get an id and embedding rows; beside LoRA, rows train
    pad_token: str | None = None  # fills rows up; null: the tokenizer's own. One it does not have is added
    rows_multiple_of: int = 1  # of the embedding's rows where more are needed; parallel.tp must divide them

    def __post_init__(self) -> None:
        if not all(self.add_tokens):
            raise ValueError("add_tokens: an empty text cannot be a token")
        if self.pad_token == "":
            raise ValueError("pad_token: an empty text cannot be a token; null is the tokenizer's own")
        if self.rows_multiple_of < 1:
            raise ValueError("rows_multiple_of: must be at least 1")
