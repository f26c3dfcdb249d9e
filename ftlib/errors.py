"""The one family of errors a user can meet. The command line prints them as one message, never a traceback."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: what is wrong, where (config key, or file:line), what to do. Exit code 2."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class Problems(UserError):
    """Every problem found by one check, so that the user mends them in one go."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@contextmanager
def about(key: str) -> Iterator[None]:
    """An error inside that says no place is about the config key `key`."""
    try:
        yield
    except UserError as error:
        if error.where is None and not isinstance(error, Problems):
            error.where = key
        raise
    except OSError as error:
        if (refused := of_system(error)) is None:
            raise
        raise UserError(refused.what, where=key, fix=refused.fix) from None


_REFUSALS = {
    errno.EACCES: "mend its permissions, or name another", errno.EPERM: "mend its permissions, or name another",
    errno.EROFS: "name another place to write to", errno.ENAMETOOLONG: "name a file or folder",
    errno.ENOSPC: "free some space, or name another place", errno.EDQUOT: "free some space, or name another place",
    errno.ELOOP: "mend the links, or name another", errno.ENOTDIR: "name another: a part of this path is a file",
}  # fmt: skip


def of_system(error: BaseException) -> UserError | None:
    """What the operating system refuses a user, such as a file without the right to read it; None for anything else."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    name = str(error.filename or "")
    what = f"{name if len(name) <= 200 else name[:200] + '…'}: {error.strerror}" if name else str(error.strerror)
    return UserError(what, fix=_REFUSALS[error.errno])


class Stopped(Exception):
    """A signal asked the run to end; its state is saved, the same command continues it. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class Hung(Exception):
    """The watchdog saw no progress. Exit code 76."""

    exit_code = 76


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `options`, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def plain_warning(message: Warning | str, *place: object, **more: object) -> str:
    """A warning for the user, who has no use for the line of ours that it came from."""
    return f"warning: {message}\n"
