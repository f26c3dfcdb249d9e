"""What is trained on, and how rows become packed batches."""

import os
from dataclasses import dataclass, field
from typing import Literal

from ftlib.config import LocalOrHub, MaybeFile

Scalar = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place rows come from."""

    path: LocalOrHub  # file, folder, pattern `x/*.jsonl`, https:// or s3:// address, Hub id `org/name[@revision]`
    format: MaybeFile = "auto"  # `messages`, `alpaca`, `text`, …; `auto`: by its columns; `./file.py:name`: a function
    weight: float = 1.0  # how often an epoch shows its rows: 2.5 times; 0.3: three of ten; of a stream: its share
    split: str | None = None  # part of the source: `train`, `[:90%]`, `test[1000:]`
    subset: str | None = None  # configuration of a Hub dataset that has several
    columns: dict[str, str] = None  # the format's column name -> the file's, when they differ
    roles: dict[str, str] = None  # the file's role name -> system, user, assistant or tool
    name: str | None = None  # name in logs; by default the file's name

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError("weight: must be a number above 0; leave a source out to switch it off")
        object.__setattr__(self, "path", os.fspath(self.path))  # from Python it may be a Path
        for key in ("columns", "roles"):
            if getattr(self, key) is None:
                object.__setattr__(self, key, {})


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training rows, held-out rows, and how they are laid out."""

    sources: tuple[Source, ...]
    eval: tuple[Source, ...] | float | None = None  # held out: sources, a share (0.05) or rows (200; a stream: of each)
    seq_len: int = 2048  # tokens of one packed row
    pack: bool = True  # several documents share a row and never see each other; false: one a row, which is then shorter
    template: MaybeFile | None = None  # chat template: a built-in name, a .jinja file; null: the tokenizer's own
    template_args: dict[str, Scalar] = field(default_factory=dict)  # what the template reads: {enable_thinking: false}
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"  # documents longer than seq_len
    train_on: tuple[Literal["system", "developer", "user", "assistant", "tool"], ...] = ("assistant",)  # roles
    train_on_end: Literal["all", "last", "none"] = "all"  # which trained turns learn to end: all, the last one, none
    thinking: Literal["keep", "drop", "split"] = "keep"  # <think>…</think> of answers: kept, removed, or as reasoning
    deduplicate: bool = False  # leave out exact repeats of a document, and training documents that are held out
    on_bad_row: Literal["error", "skip", "report"] = "error"  # a row that cannot be read; report: skip and list
    cache: MaybeFile = "auto"  # folder of tokenised data; auto: of `tune prepare`, and for large files; none: memory
    workers: int = 0  # processes that tokenise; 0: this one

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if self.seq_len < 2:
            raise ValueError("seq_len: must be at least 2")
        if not self.train_on:
            raise ValueError("train_on: at least one role")
        if self.workers < 0:
            raise ValueError("workers: must not be negative")
        if isinstance(self.eval, (int, float)) and (self.eval < 0 or (self.eval > 1 and self.eval % 1)):
            raise ValueError(f"eval: {self.eval:g} is neither a share below 1 (0.05) nor a whole number of rows (200)")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Size of an optimizer step in packed rows; accumulation follows: rows / (micro_rows x data-parallel ranks)."""

    rows: int = 8  # packed rows of one optimizer step, over all devices
    micro_rows: int = 1  # rows per device in one forward and backward

    def __post_init__(self) -> None:
        if self.rows < 1 or self.micro_rows < 1:
            raise ValueError("rows and micro_rows: must be at least 1")
