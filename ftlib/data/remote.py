"""Data from elsewhere, fetched once into the cache folder: a run then needs no network.

    https://…       a file                          org/name[@revision]    a dataset of the Hugging Face Hub
    s3://… gs://…   anything fsspec knows: a file, a folder or a pattern (its driver, such as s3fs, is installed by you)
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ftlib.data.files import SUFFIXES
from ftlib.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?:@[\w./-]+)?")


def cache_folder() -> Path:
    """Where fetched and tokenised data lie: $FTLIB_CACHE, else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FTLIB_CACHE") or Path(base) / "ftlib")


def is_remote(path: str) -> bool:
    """Whether a source's path names something that is not on this machine."""
    if "://" in path:
        return True
    looks_like_a_file = path.lower().removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)
    return bool(HUB_ID.fullmatch(path)) and not looks_like_a_file and not Path(path).expanduser().exists()


def fetched(path: str, subset: str | None = None, split: str | None = None) -> list[Path]:
    """The local files of a remote source that was fetched before; none if it was not."""
    return sorted(file for file in _folder(path, subset, split).rglob("*") if file.is_file())


def fetch(
    path: str, subset: str | None = None, split: str | None = None, again: bool = False, most: int | None = None
) -> list[Path]:
    """The local files of a remote source; `again` fetches what was fetched before. UserError if it cannot be had, or
    is not there yet and has more than `most` bytes, which are those of a stream."""
    folder = _folder(path, subset, split)
    if again or not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _get(path, subset, split, part, most)
            if folder.is_dir():
                folder.rename(part / ".old")
            part.rename(folder)  # a fetch that was cut off leaves no folder that looks whole
            shutil.rmtree(folder / ".old", ignore_errors=True)
        except OSError as error:
            if not folder.is_dir():  # unless another process was faster
                raise UserError(f"{path} cannot be fetched: {error}", fix="check the address and the network") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return fetched(path, subset, split)


def _folder(path: str, subset: str | None, split: str | None) -> Path:
    return cache_folder() / "fetched" / hashlib.sha256(repr((path, subset, split)).encode()).hexdigest()[:16]


def _get(path: str, subset: str | None, split: str | None, folder: Path, most: int | None) -> None:
    if path.startswith(("http://", "https://")):
        _https(path, folder, most)
    elif "://" in path:
        _fsspec(path, folder, most)
    else:
        _hub(path, subset, split, folder)


def _check_size(path: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        what = f"{path} cannot be read in pieces, and the whole has more than stream.cache_gib={most / (1 << 30):g}"
        raise UserError(what, where="stream.cache_gib", fix="raise it, or fetch the file yourself and name it")


def _https(url: str, folder: Path, most: int | None) -> None:
    from urllib.parse import unquote, urlparse
    from urllib.request import urlopen

    name = unquote(Path(urlparse(url).path).name) or "data"
    with urlopen(url, timeout=60) as answer, open(folder / name, "wb") as file:
        expected = int(answer.headers.get("Content-Length") or 0)
        _check_size(url, expected, most)
        while part := answer.read(1 << 20):
            file.write(part)
            _check_size(url, file.tell(), most)
    if expected and expected != (folder / name).stat().st_size:
        raise OSError(f"{(folder / name).stat().st_size:,} of {expected:,} bytes came")


def _fsspec(url: str, folder: Path, most: int | None) -> None:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
        found = files.glob(root) if any(c in root for c in "*?[") else files.find(root)
        if not found:
            raise OSError("there is no such file")
        if most is not None:
            _check_size(url, sum(files.info(place).get("size") or 0 for place in found), most)
        names = _short(found)
        for place in found:
            files.get_file(place, str(folder / names(place)))
    except ImportError as error:
        raise UserError(f"{url} needs a package: {error}", fix="install it, for example: pip install s3fs") from None
    except ValueError as error:  # an unknown protocol
        raise UserError(f"{url} cannot be fetched: {error}", fix="give a file, a Hub id, https:// or s3://") from None


def _short(found: list[str]) -> Callable[[str], str]:
    """Names without folders, unless two would be equal."""
    plain = [Path(place).name for place in found]
    if len(set(plain)) == len(plain):
        return lambda place: Path(place).name
    return lambda place: place.strip("/").replace("/", "__")


def _hub(path: str, subset: str | None, split: str | None, folder: Path) -> None:
    import datasets

    name, _, revision = path.partition("@")
    try:
        rows = datasets.load_dataset(name, subset, split=split or "train", revision=revision or None)
    except Exception as error:
        text = " ".join(str(error).split())
        fix = "check the id, `split` and `subset`; a private dataset needs `hf auth login` or HF_TOKEN"
        raise UserError(f"{path} cannot be read from the Hub: {type(error).__name__}: {text[:300]}", fix=fix) from None
    rows.to_parquet(str(folder / f"{name.rsplit('/')[-1]}.parquet"))
