"""A source's path -> its files -> their rows. Every problem is one UserError that names the file, and the line if any.

Files of any kind that `files.py` reads, folders and patterns of them, what ships with the package, and what
`remote.py` fetches: datasets of the Hub, https and any fsspec address. A stream reads remote ones as they come, with
`pieces.py`.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from ftlib.data import ranges, remote
from ftlib.data.files import PACKED, SUFFIXES, File, read_file, stem
from ftlib.data.pieces import Pieces, RemoteFile
from ftlib.data.rows import Row
from ftlib.errors import UserError, of_system
from ftlib.sections import Source

_SPLIT = re.compile(r"([\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class SplitError(UserError):
    """The part of a source that its `split` asks for is not there."""


def told(error: UserError | OSError, key: str) -> UserError:
    """The error of finding or opening the files of the source at `key`, which names its `path` or `split`."""
    known = error if isinstance(error, UserError) else of_system(error)
    if known is None:
        raise error
    where = f"{key}.split" if isinstance(error, SplitError) else f"{key}.path"
    return UserError(known.what, where=known.where or where, fix=known.fix)


class Place(NamedTuple):
    """A row, and the file it is in."""

    file: File
    row: Row


def files_of(source: Source, again: bool = False, most: int | None = None) -> list[Path]:
    """The local files of a source, in order; `again` fetches remote ones anew. `most`: as `remote.fetch` has it."""
    name, *_ = _parse(source.split, source.path)
    if remote.is_remote(source.path):
        hub = "://" not in source.path
        found = remote.fetch(source.path, source.subset, (name or None) if hub else None, again, most)
        return found if hub else _of_split(found, name, source.path)
    if any(c in source.path for c in "*?[") and not Path(source.path).exists():
        found = sorted(Path(f) for f in glob.glob(os.path.expanduser(source.path), recursive=True) if os.path.isfile(f))
        if not found:
            raise UserError(f"no file matches {source.path}", fix="quote the pattern, and look at it with ls")
        return _of_split([_short(file) for file in found], name, source.path)
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        return _of_split(_inside(folder), name, source.path)
    return _of_split([locate(source.path)], name, source.path)


def streamed_files(source: Source, pieces: Pieces, key: str) -> list[File]:
    """The files of a source, in order, remote ones to be read as they come; but what was fetched before is read here,
    and what cannot be read in ranges is fetched whole, unless it is larger than all pieces may be. `key`: of the source
    in a config."""
    name, *_ = _parse(source.split, source.path)
    hub = "://" not in source.path
    part = source.subset, (name or None) if hub else None
    if not remote.is_remote(source.path) or remote.fetched(source.path, *part):
        return list(files_of(source))
    listed = ranges.find(source.path, *part)
    if listed is None:
        return list(files_of(source, most=pieces.limit))
    found, folder = listed
    files = [RemoteFile(file, f"{key}.path", pieces) for file in found]
    if folder:
        files = [file for file in files if _known(file)]
    if not files:
        raise UserError(f"{source.path} is a folder without data files", fix=f"it has: {found[0].url}")
    return files if hub else _of_split(files, name, source.path)


def locate(path: str) -> Path:
    """The file behind a source's path: local, or `ftlib:…` for what ships with the package. UserError if none is."""
    if path.startswith("ftlib:"):
        from ftlib.models.hub import resolve

        return resolve(path)
    file = Path(path).expanduser()
    if file.is_file():
        return _short(file)
    parent = next(p for p in file.absolute().parents if p.is_dir())
    fix = f"the nearest folder that exists is {parent}"
    if parent == file.absolute().parent:
        near = difflib.get_close_matches(file.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.6)
        fix = f"similar names there: {', '.join(near)}" if near else f"{parent} has no file of a similar name"
    raise UserError(f"no such file: {file} (working directory: {Path.cwd()})", fix=fix)


def read(files: File | Sequence[File], split: str | None = None) -> Iterator[Row]:
    """Rows of one file or several, lazily, or the slice of them that `split` names (`train`, `[:90%]`, `[1000:]`)."""
    return (place.row for place in read_all([files] if isinstance(files, File) else files, split))


def read_all(files: Sequence[File], split: str | None = None) -> Iterator[Place]:
    """The same with the file of each row."""
    label = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    start, stop = _bounds(files, split, label)
    places = islice(_places(files), start, stop)
    first = next(places, None)
    if first is None:
        if (start or stop is not None) and next(_places(files), None) is not None:
            raise SplitError(
                f"the split {split} leaves no rows of {label}", fix="check the slice against the file's rows"
            )
        raise UserError(f"{label} is empty (0 rows)", fix="point the source at a file with rows")
    return chain([first], places)


def _places(files: Sequence[File]) -> Iterator[Place]:
    return (Place(file, row) for file in files for row in read_file(file))


def _parse(split: str | None, path: str) -> tuple[str, str | None, str | None]:
    match = _SPLIT.fullmatch(split or "")
    if not match:
        raise SplitError(
            f"split {split!r} of {path} is not understood", fix="write `train`, `[:90%]`, `[1000:]` or `[10:20]`"
        )
    return match.groups()


def _bounds(files: Sequence[File], split: str | None, label: str) -> tuple[int, int | None]:
    _, start, stop = _parse(split, label)
    if not any(bound and ("%" in bound or bound.startswith("-")) for bound in (start, stop)):
        return int(start or 0), int(stop) if stop else None
    count = sum(1 for _ in _places(files))

    def place(bound: str) -> int:
        number = count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
        return min(max(number + count if bound.startswith("-") else number, 0), count)

    return place(start) if start else 0, place(stop) if stop else count


def _of_split(files: list[File], name: str, path: str) -> list[File]:
    """The files whose names say that they are this part of the data (`train-00000.parquet`, `train/part.jsonl`)."""
    if name in ("", "all"):
        return files
    words = [set(re.split(r"[^a-zA-Z0-9]+", f"{file.parent.name} {stem(file)}".lower())) for file in files]
    chosen = [file for file, found in zip(files, words, strict=True) if name.lower() in found]
    if chosen or name == "train":
        return chosen or files
    raise SplitError(
        f"split {name!r} of {path} is not understood: no file of it is called so",
        fix="write `train`, `[:90%]`, `[1000:]` or `[10:20]`, or name the file in `path`",
    )


def _inside(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file, folder))
    data = [file for file in found if _known(file)]
    if (folder / "state.json").is_file() and any(file.suffix == ".arrow" for file in data):
        data = [file for file in data if file.suffix == ".arrow"]  # written by the datasets library
    if not data:
        names = ", ".join(file.name for file in found[:5])
        raise UserError(f"{folder} is a folder without data files", fix=f"it has: {names or 'nothing'}")
    return [_short(file) for file in data]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known(file: File) -> bool:
    name = file.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES) and name not in ("dataset_info.json", "readme.md", "dataset_infos.json")


def _short(file: Path) -> Path:
    """As a user would write it in a message."""
    relative = os.path.relpath(file)
    return Path(relative) if len(relative) < len(str(file)) else file
