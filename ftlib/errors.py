"""The one family of errors a user can meet. The command line prints them as one message, never a traceback."""

import difflib
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
