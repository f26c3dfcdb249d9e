"""Which checkpoints are whole: every file's size and SHA-256 against the manifest."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftlib.checkpoint.format import FORMAT, MANIFEST, STATE, Say, digests, listing

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # one plain name: nothing a manifest says leaves its folder


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte; trusts no name in the manifest."""
    files = _manifest(folder)
    if isinstance(files, str):
        return files
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted(present - files.keys()):
        return f"{name} is not in the manifest"  # the reader would take its tensors
    for name, (size, _) in files.items():
        path = folder / name
        if name not in present or path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    found = digests([folder / name for name in files])
    for (name, (_, digest)), actual in zip(files.items(), found, strict=True):
        if actual != digest:
            return f"{name} checksum mismatch"
    return None


def newest_good(root: Path, say: Say, names: Iterable[str] | None = None) -> tuple[str | None, list[str]]:
    """Name of the newest whole checkpoint (or None) and `name: reason` of each damaged one that was passed over.
    `names`: those to look at, oldest first; None: all."""
    damaged = []
    for name in reversed(list(listing(root) if names is None else names)):
        reason = _reason(root / name)
        if reason is None:
            return name, damaged
        damaged.append(f"{name}: {reason}")
        say(f"skip {name}: {reason}")
    return None, damaged


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint that `verify` found whole."""
    return json.loads((folder / STATE).read_text())


def _reason(folder: Path) -> str | None:
    try:
        return verify(folder)
    except OSError as error:
        return str(error)


def _manifest(folder: Path) -> dict[str, tuple[int, str]] | str:
    """The manifest's files, or why it cannot be used."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        return f"{MANIFEST} is no JSON ({error})"
    problem = next(_faults(manifest), None)
    return problem or {name: (size, digest) for name, (size, digest) in manifest["files"].items()}


def _faults(manifest: Any) -> Iterator[str]:
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        yield f"{MANIFEST} lists no files"
        return
    if manifest.get("format") != FORMAT:
        yield f"format {manifest.get('format')!r}, this program reads {FORMAT}"
    if STATE not in manifest["files"]:
        yield f"{MANIFEST} lists no {STATE}"
    for name, entry in manifest["files"].items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            yield f"{MANIFEST} names {name!r}, which is no plain file name"
        if not (isinstance(entry, list) and list(map(type, entry)) == [int, str]):
            yield f"{MANIFEST} has no size and checksum of {name!r}"
