"""The Hugging Face Hub: what a download needs is asked before its first byte, and its errors become one message."""

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftlib.errors import UserError, did_you_mean

FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.tiktoken", "merges.txt", "vocab*")
LEFT_OUT = ("*/*", "consolidated*")  # folders hold other formats; `consolidated` is a second copy of the weights
LOGIN = "set HF_TOKEN (or run `hf auth login`)"
SPARE = 1 << 28  # bytes that stay free


@functools.cache
def cached(name: str) -> Path:
    """The folder of a Hub id `org/name[@revision]` in Hugging Face's cache; asks the Hub once a process."""
    return fetch(name)


def fetch(name: str, folder: Path | None = None, *, weights: bool = True) -> Path:
    """Download `org/name[@revision]` (weights, config, tokenizer; no code) to the cache, or as plain files to `folder`.

    Files that are there already are not fetched again, one that broke off goes on where it stopped. UserError when it
    cannot work, before anything is fetched: no such repository or revision, no right to it, no room, no connection.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    place = {"local_dir": folder} if folder else {}
    left_out = list(LEFT_OUT if weights else (*LEFT_OUT, "*.safetensors"))
    with explained(name):
        need = _missing_bytes(repo, revision or None, folder, left_out)
        if need:
            _check_room(name, need, folder or _cache())
        found = snapshot_download(
            repo, revision=revision or None, endpoint=endpoint(),
            allow_patterns=list(FILES), ignore_patterns=left_out, **place,
        )  # fmt: skip
    return Path(found)


def endpoint() -> str | None:
    """The Hub's address if the environment names another one; read at the time of use."""
    return os.environ.get("HF_ENDPOINT") or None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _missing_bytes(repo: str, revision: str | None, folder: Path | None, left_out: list[str]) -> int:
    """Bytes that a download would add to what is there; 0 where the Hub cannot be asked (the cache may have it all)."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    if constants.HF_HUB_OFFLINE:
        return 0
    api = HfApi(endpoint=endpoint())
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=10)
    except Exception as error:
        if _status(error):  # the Hub has answered; else it cannot be reached
            raise
        return 0
    if info.gated:
        api.auth_check(repo)  # metadata is public, the files are not
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = filter_repo_objects(sizes, allow_patterns=list(FILES), ignore_patterns=left_out)
    total = 0
    for file in wanted:
        if folder:
            there = (folder / file).is_file() and (folder / file).stat().st_size == sizes[file]
        else:
            there = isinstance(try_to_load_from_cache(repo, file, revision=info.sha), str)
        total += 0 if there else sizes[file]
    return total


def _check_room(name: str, need: int, place: Path) -> None:
    place = place.expanduser().absolute()
    there = next(p for p in [place, *place.parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + SPARE:
        raise UserError(
            f"no room for {name}: {size(need)} are to be downloaded, {size(free)} are free",
            where=str(place),
            fix="free some space, or set HF_HOME (or DIR of `tune download`) to a folder on another disk",
        )


def size(count: float) -> str:
    """Bytes for a reader: `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What goes wrong with the repository `name` inside, as a `UserError` that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # httpx and huggingface_hub have many, and they change between versions
        found = _explain(error, *name.partition("@")[::2])
        if found is None:
            raise
        raise found from None


def _explain(error: Exception, repo: str, revision: str) -> UserError | None:
    """The message for an error of huggingface_hub, None for a bug."""
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repo} is gated on the Hub", fix=f"accept its terms on its page, then {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision or 'main'!r} on the Hub"
        return UserError(what, fix="look at its branches and tags")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(
            f"{repo} is not in the local cache and the Hub cannot be reached",
            fix=f"connect, unset HF_HUB_OFFLINE, or give a local folder: {Path.cwd() / repo} is none",
        )
    if isinstance(error, errors.RepositoryNotFoundError) and "Invalid" not in str(error):
        near = did_you_mean(repo, [p.name for p in Path.cwd().iterdir() if p.is_dir()])
        return UserError(
            f"{repo}: neither a folder here ({Path.cwd()}) nor a repository on the Hub{near}",
            fix=f"check the spelling; for a private repository {LOGIN}",
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{repo}: {str(error).splitlines()[0]}", fix="a Hub id has the form org/name")
    if status in (401, 403):
        return UserError(f"the Hub refuses {repo}: the token is wrong, or has no right to it", fix=LOGIN)
    if status or isinstance(error, OSError | errors.OfflineModeIsEnabled) or "httpx" in type(error).__module__:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return UserError(f"{repo}: {reason}", fix="run the same command again; it goes on where it stopped")
    return None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
