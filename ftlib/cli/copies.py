"""Copies of shipped files: the line that says what each was made from, and the original that is kept beside it."""

import re
from dataclasses import dataclass
from pathlib import Path

from ftlib import __version__
from ftlib.cli import assets
from ftlib.errors import UserError

_HEADER = re.compile(r"# from ftlib (\S+) ((?:recipes/|configs/|model:)\S+) sha256:([0-9a-f]{12})")


@dataclass(frozen=True)
class Copy:
    """A copy with its first line read."""

    path: Path
    text: str  # without the first line
    version: str  # of ftlib when it was made
    name: str  # of what it was made from, as `tune ls` prints it
    theirs: str  # the text of the version that ships now
    changed: bool  # whether that is another text than then

    @property
    def original(self) -> Path:
        """Where the text was kept that the copy started from."""
        return original(self.path)


def original(path: Path) -> Path:
    """`.NAME.orig` beside a copy."""
    return path.with_name(f".{path.name}.orig")


def write(path: Path, name: str, text: str | None = None) -> None:
    """Write a copy of what ships as `name` (or its edited `text`) with its first line, and keep the original. May raise
    OSError."""
    theirs, digest = _ships(name)
    header = f"# from ftlib {__version__} {name} sha256:{digest}"
    path.write_text(f"{header}\n{theirs if text is None else text}", encoding="utf-8")
    original(path).write_text(theirs, encoding="utf-8")


def read(path: Path) -> Copy:
    """A copy on disk. Raises `UserError` when it is none, or of something that no longer ships."""
    try:
        header, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    match = _HEADER.fullmatch(header.strip())
    if match is None:
        raise UserError(
            f"{path}: the first line does not say what it was copied from",
            where=f"{path}:1",
            fix="it should read `# from ftlib VERSION recipes/NAME.py sha256:…`; make the copy with `tune cp`",
        )
    version, name, then = match.groups()
    theirs, digest = _ships(name)
    return Copy(path, text, version, name, theirs, digest != then)


def _ships(name: str) -> tuple[str, str]:
    """The text that ships as `name`, as it reads in another folder, and its digest, which no folder changes."""
    if name.startswith("model:"):
        from ftlib.models.extract import extract  # imports torch

        text = extract(name.removeprefix("model:"))
        return text, assets.digest(text)
    kind, _, file = name.partition("/")
    found = assets.find_shipped(kind, file)
    if found is None:
        raise UserError(f"{name}: ftlib {__version__} no longer ships it{assets.suggestion(kind, file)}")
    return assets.as_copied(found[1]), assets.digest(found[1].read_text(encoding="utf-8"))
