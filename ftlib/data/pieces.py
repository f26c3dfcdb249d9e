"""Remote files that are read as they come: pieces of them in a folder that never outgrows its size.

All processes of a machine share the folder. Who needs a piece fetches it while the others wait for it; where there is
no room for another, the one that was not read for the longest goes. Nothing but time depends on what is in the folder:
a piece that is gone is fetched again, so no process ever waits for another to read on.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ftlib.data import ranges
from ftlib.errors import UserError, of_system

PIECE = 16 << 20  # bytes
LEAST = 4  # pieces of each source that there must be room for
AHEAD = 16  # pieces that are fetched before they are needed
BUFFER = 1 << 20  # bytes that a reader has in memory
BOOK, PART = "size", ".part"  # how many bytes there are; a piece that is being fetched


@dataclass(frozen=True)
class Pieces:
    """The folder. `limit`: bytes of all its files, those that are being fetched included."""

    folder: Path
    limit: int

    def read(self, file: "RemoteFile", at: int, size: int) -> bytes:
        """At most `size` bytes of a file from `at` on. UserError if they cannot be had."""
        number, start = divmod(at, PIECE)
        piece = self.get(file, number)
        try:
            return os.pread(piece, size, start)
        finally:
            os.close(piece)

    def get(self, file: "RemoteFile", number: int, wait: bool = True) -> int | None:
        """A descriptor of a piece, fetched if it is not there. Without `wait`: None where another process does so, and
        one try."""
        path, size = self.folder / file.mark(number), min(PIECE, file.found.size - number * PIECE)
        part = path.with_name(path.name + PART)
        while True:
            with contextlib.suppress(FileNotFoundError):
                piece = os.open(path, os.O_RDONLY)
                if os.fstat(piece).st_size == size:
                    os.utime(piece)  # it was needed now
                    return piece
                os.close(piece)  # of a disk that failed: its end would pass for the file's
                path.unlink()
            with _turn(part, wait) as own:
                if own is None:
                    return None
                if path.exists():  # another process was faster
                    part.unlink()
                    continue
                self._make_room(own, size)
                _write(own, file.fetch(number * PIECE, size, patient=wait))
                with _turn(self.folder / BOOK):  # not while files are counted
                    part.rename(path)
                return os.dup(own)

    def _make_room(self, own: int, size: int) -> None:
        """Give the part `own` its size, when the folder has room for it."""
        while True:
            with _turn(self.folder / BOOK) as book:
                known = os.pread(book, 32, 0).strip()  # at least: what was removed by hand it still counts
                used = int(known) if known.isdigit() else sum(size for _, size, _ in self._files())
                more = size - os.fstat(own).st_size
                if not more:  # a process that was killed gave it its size
                    return
                if used + more > self.limit:
                    used = self._prune(self.limit * 7 // 8 - more)
                fits = used + more <= self.limit
                os.pwrite(book, b"%-32d" % (used + more * fits), 0)
                if fits:
                    os.truncate(own, size)
            if fits:
                return
            time.sleep(0.01)  # all that is left is being fetched, and will be there whatever its readers do

    def room(self) -> int:
        """Bytes of the disk that pieces may take: what is free, and what they have."""
        with _turn(self.folder / BOOK):
            return shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """When it was last needed, size and place of each file."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        return [file for file in found if file[2].name != BOOK]

    def _prune(self, most: int) -> int:
        """Remove what was not needed for the longest until `most` bytes are left, if it can be; what is left."""
        found = self._files()
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= most:
                break
            with _turn(path, wait=False) if path.suffix == PART else contextlib.nullcontext(0) as own:
                if own is not None:  # nobody fetches it: of a process that was killed
                    path.unlink(missing_ok=True)
                    used -= size
        return used


@contextlib.contextmanager
def _turn(path: Path, wait: bool = True) -> Iterator[int | None]:
    """A descriptor of a file that nobody else has meanwhile; None where somebody does and we do not `wait`."""
    own = _taken(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield own
    finally:
        if own is not None:
            fcntl.flock(own, fcntl.LOCK_UN)  # closing is not enough: a process that was forked meanwhile has it too
            os.close(own)


def _taken(path: Path, how: int) -> int | None:
    while True:
        try:
            own = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unfit(path.parent, f"cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(own, how)
            if os.path.samestat(os.fstat(own), os.stat(path)):
                return own
        except FileNotFoundError:
            pass  # it was moved away while we waited
        except BlockingIOError:
            os.close(own)
            return None
        except OSError as error:
            os.close(own)
            raise _unfit(path.parent, f"is on a file system without locks: {error.strerror}") from None
        os.close(own)


def _unfit(folder: Path, why: str) -> UserError:
    return UserError(f"{folder} {why}", where="FTLIB_CACHE", fix="name a folder of your own, on a disk of this machine")


def _write(own: int, data: bytes) -> None:
    try:
        with open(own, "wb", closefd=False) as opened:
            opened.write(data)
        os.fsync(own)  # a machine that loses its power leaves no piece of zeros
    except OSError as error:
        known = of_system(error)
        if known is None:
            raise
        raise UserError(f"pieces of the stream: {known.what}", where="stream.cache_gib", fix=known.fix) from None


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere that is read like one of here.

    `key`: of its source in a config, which errors name. `ahead`: pieces that are fetched before they are needed, of
    this file and of those `behind` it."""

    found: ranges.Found
    key: str
    pieces: Pieces = field(repr=False)
    ahead: int = 0
    behind: "RemoteFile | None" = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> PurePosixPath:
        """Where it lies on its server."""
        return PurePosixPath(unquote(urlsplit(self.found.url).path))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name or "data"

    @property
    def parent(self) -> PurePosixPath:
        """The rest of it."""
        return self.path.parent

    def __str__(self) -> str:
        return self.found.url.partition("?")[0]  # behind it there may be a key

    @property
    def version(self) -> str:
        """Changes with its bytes, not with the place it comes from."""
        text = f"{self.name} {self.found.size} {self.found.version}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def mark(self, number: int) -> str:
        """The name of a piece in the folder."""
        text = "\n".join(map(str, (*self.found, PIECE)))
        return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}-{number:06d}"

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Its bytes."""
        assert mode == "rb", "a remote file is only read"
        return io.BufferedReader(_Raw(self), BUFFER)

    def fetch(self, start: int, size: int, patient: bool = True) -> bytes:
        """Bytes of it from its server. UserError if they do not come, or are those of another file than was found."""
        try:
            get = lambda: ranges.read(self.found, start, size)  # noqa: E731
            return ranges.patiently(get, ranges.PAUSES if patient else ())
        except UserError:
            raise
        except ranges.Changed as error:
            raise changed(f"{self}: {error}", self.key) from None
        except Exception as error:  # each driver has errors of its own
            what = f"{self} cannot be read: {ranges.said(error)}"
            fix = "check the network and the address; the same command continues the run"
            raise UserError(what, where=self.key, fix=fix) from None


def changed(what: str, key: str | None) -> UserError:
    """The error of a file that is no longer what the run began with."""
    fix = "put the files back (of the Hub: name the commit that the run told when it began, org/name@commit)"
    fix += ", or start over: checkpoint.resume=never"
    return UserError(f"a file changed since the run began. {what}", where=key, fix=fix)


def in_order(files: Sequence["RemoteFile | Path"], ahead: int) -> tuple["RemoteFile | Path", ...]:
    """Files that are read one after the other: while one is, pieces of it and of those behind are fetched `ahead`."""
    linked: list[RemoteFile | Path] = []
    behind = None
    for file in reversed(files):
        if isinstance(file, RemoteFile):
            file = behind = replace(file, ahead=ahead, behind=behind)
        linked.append(file)
    return tuple(reversed(linked))


class _Raw(io.RawIOBase):
    """The bytes of a remote file, a piece at a time."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at, self._number, self._begun = file, 0, -1, False
        self._wanted: queue.SimpleQueue[int | None] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._file.found.size)[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        if self._begun and self._at // PIECE != self._number:  # not yet at the first bytes, which tell its kind
            self._number = self._at // PIECE
            self._look_ahead()
        self._begun = True
        size = min(len(buffer), self._file.found.size - self._at)
        if size <= 0:
            return 0
        data = self._file.pieces.read(self._file, self._at, size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if self._wanted is not None:
            self._wanted.put(None)
        super().close()

    def _look_ahead(self) -> None:
        if not self._file.ahead:
            return
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            threading.Thread(target=_fetch_ahead, args=(self._file, self._wanted), daemon=True).start()
        self._wanted.put(self._number)


def _fetch_ahead(file: RemoteFile, wanted: "queue.SimpleQueue[int | None]") -> None:
    """Fetch what lies behind each piece that is read. What fails, its reader meets again."""
    while (number := wanted.get()) is not None:
        with contextlib.suppress(Exception):
            for next_file, next_number in _behind(file, number):
                piece = next_file.pieces.get(next_file, next_number, wait=False)
                if piece is not None:
                    os.close(piece)
                if not wanted.empty():  # its reader is further by now
                    break


def _behind(file: RemoteFile, number: int) -> Iterator[tuple[RemoteFile, int]]:
    at: RemoteFile | None = file
    for _ in range(file.ahead):
        number += 1
        while at is not None and number * PIECE >= at.found.size:
            at, number = at.behind, 0
        if at is None:
            return
        yield at, number
