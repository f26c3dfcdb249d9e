"""Tokenised data on disk, found again by what it was made from: bytes, template, tokenizer, settings and our code."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftlib import plugins
from ftlib.data.formats import FORMATS
from ftlib.data.preference import Wanted
from ftlib.data.remote import cache_folder
from ftlib.errors import UserError, about
from ftlib.sections import Data, Source

LARGE = 64 << 20  # bytes of a source from which on `auto` writes what it tokenised
SHARED = 1 << 20  # the same where other processes of the machine would tokenise it too


def folder_of(cfg: Data) -> Path | None:
    """Where tokenised data are kept; None: nowhere."""
    if cfg.cache in ("none", ""):
        return None
    folder = cache_folder() / "tokens" if cfg.cache == "auto" else Path(cfg.cache).expanduser()
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        key = "data.cache" if cfg.cache != "auto" else "FTLIB_CACHE in the environment"
        raise UserError(f"{there} is a file, not a folder", where=key, fix="name a folder, or none")
    return folder


def writes(cfg: Data, files: list[Path]) -> bool:
    """Whether a run keeps what it tokenises of these files: several processes of one machine share more of it."""
    least = LARGE if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 else SHARED
    return cfg.cache != "auto" or sum(file.stat().st_size for file in files) >= least


def key(
    source: Source, cfg: Data, files: list[Path], tokenizer: Any, keep_examples: bool, wanted: Wanted = Wanted()
) -> str | None:
    """SHA-256 of all that decides on the documents; None for a tokenizer that cannot be told from others."""
    mark = getattr(tokenizer, "fingerprint", None)
    try:
        code = _code(source.format)
    except UserError:  # said, with its place in the config, where the function is needed
        return None
    if mark is None:
        return None
    about = {
        "files": [_digest(file) for file in files],
        "source": [source.format, source.split, sorted(source.columns.items()), sorted(source.roles.items())],
        "code": code,
        "settings": [cfg.seq_len, cfg.overlong, cfg.train_on, cfg.train_on_end, cfg.thinking, cfg.on_bad_row],
        "tokenizer": [mark, tokenizer.chat_template, keep_examples],
        "wanted": dataclasses.astuple(wanted),
        "library": _library(),
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Processes of one machine take turns: the first tokenises, the others find its work."""
    import fcntl

    with about("data.cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f"{folder.name}.lock"), "w")  # noqa: SIM115 - closed with the block below
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _code(format: str) -> str | None:
    """SHA-256 of the code of a function of the user; None for a format of the library."""
    if format == "auto" or format in FORMATS:
        return None
    return plugins.digest(plugins.files(format, plugins.find("formats", format, {})))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return f"{file.name} {digest.hexdigest()}"  # the name says what kind of text it is


@lru_cache(maxsize=1)
def _library() -> str:
    """SHA-256 of the code between bytes and masks, and of the libraries that cut text."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted([*(root / "data").glob("*.py"), *(root / "tokenizers").glob("*.py")]):
        digest.update(file.read_bytes())
    for name in ("tokenizers", "tiktoken", "sentencepiece", "jinja2"):
        digest.update(f"{name} {version(name)}".encode())
    return digest.hexdigest()
