"""Fetch and tokenise the data of a run, so that it starts from disk, offline. Needs no GPU and reads no weights.

    tune prepare RECIPE --config FILE [key=value …] [data.workers=8]

All cores tokenise, unless data.workers says how many.
Remote sources are fetched anew. What is kept is found again by its content: the bytes of the files, the chat template,
the tokenizer, the settings of `data` and our code. It lies in data.cache: by default $FTLIB_CACHE or ~/.cache/ftlib.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

from ftlib import config
from ftlib.cli import recipe
from ftlib.errors import UserError

MOST = 16  # processes, where data.workers does not say how many


def main(argv: Sequence[str]) -> int:
    """`tune prepare RECIPE --config F [k=v]`"""
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__.strip())
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError("tune prepare: the recipe comes first", fix="tune prepare RECIPE --config FILE [key=value …]")
    path = recipe.find(argv[0], "prepare")
    cfg, places = config.read(recipe.load(path).Config, recipe.with_shipped_configs(argv[1:]))
    if not hasattr(cfg, "model") or not hasattr(getattr(cfg, "data", None), "cache"):
        raise UserError(f"{path}: its config has no model and no data that are kept, so there is nothing to prepare")
    with places.told():
        _prepare(cfg)
    return 0


def _prepare(cfg: Any) -> None:
    if cfg.data.cache == "none":
        what = "data.cache is none, so nothing would be kept"
        raise UserError(what, where="data.cache", fix="name a folder, or auto")
    from ftlib import build, data  # imports torch
    from ftlib.data import cache

    start = time.monotonic()
    options = {"prepare": True, "wanted": build.wanted(cfg)}
    workers = cfg.data.workers or min(len(os.sched_getaffinity(0)), MOST)
    section = dataclasses.replace(cfg.data, workers=workers)
    rows = data.load(section, build.tokenizer(cfg), seed=getattr(cfg, "seed", 0), **options)
    print("\n".join(rows.report.lines()))
    tokens = sum(int(documents.lengths.sum()) for documents in (rows.train, *rows.eval.values()))
    seconds = time.monotonic() - start
    speed = f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    print(f"ready in {cache.folder_of(cfg.data)}: {tokens:,} tokens, {speed}")
