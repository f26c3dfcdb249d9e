"""One checkpoint as a folder: its names, its two JSON files, its atomic appearance and its removal.

    step_000120/  shard-00001-model-00001-of-00001.safetensors …   tensors, written by the rank in the name
                  state.json      everything that is no tensor
                  MANIFEST.json   {"format": 1, "files": {name: [bytes, sha256]}}, written last
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
OWN = re.compile(r"(step_[0-9]+|\.tmp_step_[0-9]+|\.del_step_[0-9]+)")  # the only folders that are ever deleted here
Say = Callable[[str], None]


def step_name(step: int) -> str:
    """`step_000120` of 120."""
    return f"step_{step:06d}"


def listing(root: Path, prefix: str = "") -> dict[str, int]:
    """Folder names `<prefix>step_N` in `root` with their N, lowest first. Symbolic links are not ours."""
    pattern = re.compile(re.escape(prefix) + r"step_([0-9]+)")
    found = {}
    if root.is_dir():
        for entry in os.scandir(root):
            match = pattern.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found[entry.name] = int(match[1])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def remove(path: Path) -> None:
    """Delete one of our folders if it is there. Refuses (ValueError) any other name and symbolic links."""
    if not OWN.fullmatch(path.name) or path.is_symlink():
        raise ValueError(f"refusing to delete {path}: not a checkpoint folder of this program")
    if path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder (its names)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's bytes, as hex; several files at a time (hashing releases the interpreter lock)."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_sha256, paths))


def write_json(path: Path, value: Any) -> list[Any]:
    """Write, fsync, and return the manifest's entry [bytes, sha256]."""
    data = json.dumps(value, indent=1).encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return [len(data), hashlib.sha256(data).hexdigest()]


def seal(folder: Path, prefix: str) -> dict[str, list[Any]]:
    """Make the files starting with `prefix` durable; their manifest entries."""
    paths = sorted(folder.glob(f"{prefix}*"))
    for path in paths:
        sync(path)
    return {path.name: [path.stat().st_size, digest] for path, digest in zip(paths, digests(paths), strict=True)}


def publish_step(root: Path, step: int, state: dict[str, Any], files: dict[str, list[Any]]) -> None:
    """Complete `.tmp_step_N` and rename it to `step_N`. At every moment a complete copy of N, if there ever was one,
    is in `root` under one of the two names; `sweep` ends what a kill interrupts between the renames."""
    name = step_name(step)
    temporary, final, old = root / f".tmp_{name}", root / name, root / f".del_{name}"
    files = files | {STATE: write_json(temporary / STATE, state)}
    write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
    sync(temporary)
    if final.exists():  # saved before, then rolled back or damaged
        remove(old)
    put_in_place(temporary, final, old)


def put_in_place(new: Path, place: Path, aside: Path) -> None:
    """Rename the folder `new` to `place`; what stood there goes to `aside`, and comes back if that fails."""
    replaced = place.exists()
    if replaced:
        os.rename(place, aside)
    try:
        os.rename(new, place)
    except BaseException:
        if replaced:
            os.rename(aside, place)
        raise
    sync(place.parent)


def sweep(root: Path, intact: Callable[[Path], bool], say: Say) -> None:
    """Tidy what a killed run left: a complete `.tmp_step_N` without a `step_N` is published, the rest removed."""
    for name in listing(root, ".tmp_"):
        final = root / name.removeprefix(".tmp_")
        if not final.exists() and (root / name / MANIFEST).exists() and intact(root / name):
            os.rename(root / name, final)
            sync(root)
            say(f"completed {final.name}, which was interrupted while being published")
        else:
            remove(root / name)
    for name in listing(root, ".del_"):
        remove(root / name)


def discard(temporary: Path) -> None:
    """Give back the space of a save that failed; a complete one stays for `sweep` to judge."""
    try:
        if not (temporary / MANIFEST).exists():
            remove(temporary)
    except OSError:
        pass  # the failure that brought us here is the one to report; the next start sweeps


def prune(root: Path, keep: int, newest: int, unwanted: set[str], say: Say, also: Collection[str] = ()) -> None:
    """Keep the `keep` newest checkpoints up to step `newest`, and those in `also`. Later ones and `unwanted` belong to
    an abandoned line."""
    names = listing(root)
    line = [name for name, step in names.items() if step <= newest and name not in unwanted]
    old = [name for name in line[:-keep] if name not in also]
    for name in [*sorted(names.keys() - set(line)), *old, *listing(root, ".del_")]:
        victim = root / (name if name.startswith(".") else f".del_{name}")
        try:
            if victim.name != name:
                remove(victim)
                os.rename(root / name, victim)
            remove(victim)
        except (OSError, ValueError) as error:  # the new checkpoint is safe, so this is no reason to stop
            say(f"{name} stays: {error}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
