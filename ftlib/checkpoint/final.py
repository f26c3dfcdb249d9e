"""Results appear whole or not at all: written beside their place, then renamed into it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftlib.checkpoint.agree import Ranks, together
from ftlib.checkpoint.format import put_in_place, sync


@contextmanager
def final_folder(run: Ranks, output_dir: Path) -> Iterator[Path]:
    """`with final_folder(run, output_dir) as folder:` – what rank 0 writes there appears as `<output_dir>/final`,
    whole, when the block ends. Collective: every rank gets the path, and an error of one is raised on all."""
    folder = Path(output_dir) / "final"
    with together(run, f"preparing {folder}"):
        if run.is_main:
            staging(folder)
    with together(run, f"writing {folder}"):
        yield _beside(folder, ".tmp_")
    with together(run, f"publishing {folder}"):
        if run.is_main:
            publish(_beside(folder, ".tmp_"), folder)


def staging(folder: Path) -> Path:
    """An empty `.tmp_<name>` beside `folder` to write into; what a killed export left there is removed. Rank 0 only."""
    temporary = _beside(folder, ".tmp_")
    _clear(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, folder: Path) -> None:
    """Make `temporary` durable and rename it to `folder`, replacing an earlier result. Rank 0 only.

    `temporary` is what `staging(folder)` gave (ValueError otherwise).
    """
    if temporary != _beside(folder, ".tmp_"):
        raise ValueError(f"{temporary} is not the staging folder of {folder}")
    for path in sorted(temporary.rglob("*")):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(temporary)
    old = _beside(folder, ".del_")
    _clear(old)
    if folder.is_symlink():
        raise ValueError(f"refusing to replace {folder}: it is a symbolic link")
    put_in_place(temporary, folder, old)
    _clear(old)


def _beside(folder: Path, prefix: str) -> Path:
    return folder.parent / f"{prefix}{folder.name}"


def _clear(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"refusing to delete {path}: it is a symbolic link")
    if path.exists():
        shutil.rmtree(path)
