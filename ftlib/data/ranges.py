"""Ranges of bytes of files elsewhere: which files a source has, their sizes and versions, and patient reading.

https through the standard library, everything else (`s3://`, `gs://`, `hf://`) through its driver of fsspec. Files of
the Hub are taken at the commit where their branch stands when a run begins.
"""

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple
from urllib.error import HTTPError

from ftlib.errors import UserError

PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before the next try
FIRST = PAUSES[:2]  # the same at the start, where it may be the address that is wrong
WAIT = 60  # seconds without a byte after which a connection counts as lost
# What drivers say of a file that is another when its bytes are others, the surest first.
_MARKS = (
    "blob_id", "ETag", "etag", "xet_hash", "generation", "crc32c", "content_md5", "Last-Modified", "LastModified",
    "last_modified", "updated", "mtime", "created",
)  # fmt: skip
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_LATER = (408, 425, 429)  # answers of a server that is busy; other 4xx stay as they are


class Changed(Exception):
    """A file is another one than when the run began."""


_FINAL = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, ValueError, Changed, UserError)


class Found(NamedTuple):
    """A file elsewhere. `version`: changes when its bytes do; empty where nothing tells."""

    url: str
    size: int
    version: str

    @property
    def commit(self) -> str | None:
        """Of a file of the Hub: where its branch stood."""
        match = _COMMIT.search(self.url)
        return match[1] if match else None


def find(path: str, subset: str | None = None, split: str | None = None) -> tuple[list[Found], bool] | None:
    """Files behind a remote `path` of a source, by name, and whether it names a folder; None where they cannot be read
    in ranges. `subset`, `split`: of a Hub id. UserError if there is none."""
    try:
        if path.startswith(("http://", "https://")):
            found = patiently(lambda: _probe(path), FIRST)
            return None if found is None else ([found], False)
        return patiently(lambda: _listed(path), FIRST) if "://" in path else _of_hub(path, subset, split)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path} needs a package: {error}", fix="install it, for example: pip install s3fs") from None
    except ValueError as error:  # an unknown protocol; a dataset without such a subset
        raise UserError(f"{path} cannot be fetched: {error}", fix="give a file, a Hub id, https:// or s3://") from None
    except Exception as error:  # each driver and the Hub have errors of their own
        fix = "check the address and the network; what is private needs its key, on the Hub HF_TOKEN"
        raise UserError(f"{path} cannot be fetched: {said(error)}", fix=fix) from None


def read(file: Found, start: int, size: int) -> bytes:
    """Bytes [start, start + size). Changed if the file is not the one that was found, OSError if they did not come."""
    get = _http if file.url.startswith(("http://", "https://")) else _fsspec
    data, now = get(file, start, size)
    if (now.size, now.version) != (file.size, file.version):
        raise Changed(f"{now.size:,} bytes, version {now.version!r}; {file.size:,}, {file.version!r} when it was found")
    if len(data) != size:
        raise ConnectionError(f"{len(data):,} of {size:,} bytes came")
    return data


def patiently(get: Callable[[], Any], pauses: tuple[float, ...]) -> Any:
    """`get()`, tried again after each pause where a connection was lost; the last error is raised."""
    for pause in pauses:
        try:
            return get()
        except Exception as error:  # each driver has errors of its own
            if _final(error):
                raise
            time.sleep(pause)
    return get()


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _final(error: Exception) -> bool:
    """Whether another try would meet the same."""
    status = error.code if isinstance(error, HTTPError) else None
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _LATER
    return isinstance(error, _FINAL)


def _probe(url: str) -> Found | None:
    """An address; None where its server answers with the whole, or with a file of unknown size."""
    try:
        return _http(Found(url, 0, ""), 0, 1)[1]
    except NotImplementedError:
        return None


def _http(file: Found, start: int, size: int) -> tuple[bytes, Found]:
    from urllib.request import Request, urlopen

    wanted = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    try:
        with urlopen(Request(file.url, headers=wanted), timeout=WAIT) as answer:
            place, _, total = answer.headers.get("Content-Range", "").partition("/")
            if answer.status != 206 or not total.isdigit():
                raise NotImplementedError("the server gives no ranges")
            if not place.startswith(f"bytes {start}-"):
                raise ConnectionError(f"{place} came, bytes {start}- were asked for")
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            return answer.read(size), Found(file.url, int(total), version)
    except HTTPError as error:
        if error.code == 416:  # none of these bytes is there: it is empty, or shorter than it was
            raise (Changed("it is shorter") if file.size else NotImplementedError("it is empty")) from None
        raise


def _fsspec(file: Found, start: int, size: int) -> tuple[bytes, Found]:
    import fsspec

    files, place = fsspec.core.url_to_fs(file.url)
    with files.open(place, "rb", cache_type="none") as opened:
        opened.seek(start)
        data = opened.read(size)
    if file.commit:  # which nobody can change
        return data, file
    files.invalidate_cache()
    return data, _found(file.url, files.info(place))


def _found(url: str, info: dict[str, Any]) -> Found:
    version = next((info[mark] for mark in _MARKS if info.get(mark)), "")
    return Found(url, int(info["size"]), str(version.timestamp() if isinstance(version, datetime) else version))


def _listed(path: str) -> tuple[list[Found], bool] | None:
    import fsspec

    files, root = fsspec.core.url_to_fs(path)
    files.invalidate_cache()
    root = _pinned(files, root) if path.startswith("hf://") else root
    pattern = any(c in root for c in "*?[")
    single = not pattern and files.isfile(root)
    listed = {root: files.info(root)} if single else (files.glob if pattern else files.find)(root, detail=True)
    first = next(iter(listed), None)
    if first is not None and _found(first, listed[first]) != _found(first, files.info(first)):
        listed = {name: files.info(name) for name in listed}  # a driver whose lists say other things of a file
    folder = not pattern and not single
    names = [name for name in sorted(listed) if listed[name]["type"] == "file"]
    if folder:
        names = [name for name in names if "/." not in name.removeprefix(root)]  # hidden, or in what is hidden
    found = [_found(files.unstrip_protocol(name), listed[name]) for name in names]
    if not found:
        raise UserError(f"{path}: there is no such file", fix="check the address, and look at what is there")
    return (found, folder) if _leads_to(files, found[0].url) else None


def _leads_to(files: Any, url: str) -> bool:
    """Whether an address made of a file's name leads to it: not within an archive, nor where `path` names a host."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0] == files
    except Exception:  # each driver has errors of its own
        return False


def _pinned(files: Any, root: str) -> str:
    """A place in a repository of the Hub at the commit where it is now."""
    from huggingface_hub import HfApi

    place = files.resolve_path(root)
    if not hasattr(place, "repo_id"):  # a bucket has no commits
        return root
    commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"{kind}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")


def _of_hub(path: str, subset: str | None, split: str | None) -> tuple[list[Found], bool]:
    """The files that the datasets library would read for a subset and a split, at their commit. It tries again where a
    connection is lost."""
    import datasets
    import fsspec

    name, _, revision = path.partition("@")
    try:
        parts = datasets.load_dataset_builder(name, subset, revision=revision or None).config.data_files or {}
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        fix = "check the id, `split` and `subset`; a private dataset needs `hf auth login` or HF_TOKEN"
        raise UserError(f"{path} cannot be read from the Hub: {said(error)}", fix=fix) from None
    if (split or "train") not in parts:
        there = ", ".join(map(str, parts)) or "none"
        raise UserError(f"{path} has no split {split or 'train'!r}", fix=f"its splits: {there}")
    return list(_infos(fsspec, parts[split or "train"])), False


def _infos(fsspec: Any, urls: list[str]) -> Iterator[Found]:
    for url in urls:
        files, place = fsspec.core.url_to_fs(url)
        yield _found(url, files.info(place))
