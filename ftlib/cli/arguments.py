"""Command lines whose mistakes read like every other mistake."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ftlib.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse with our messages: an error is a `UserError` that quotes the usage."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            prog=f"tune {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments of the verb; raises `UserError`."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            kind = "option" if unknown[0].startswith("-") else "argument"
            raise self._mistake(f"unknown {kind} {unknown[0]!r}{did_you_mean(unknown[0], options)}")
        return args

    def error(self, message: str) -> NoReturn:
        raise self._mistake(message)

    def _mistake(self, message: str) -> UserError:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        return UserError(f"{self.prog}: {message}", fix=usage)
