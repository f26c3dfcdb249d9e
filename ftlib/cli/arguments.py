"""Command lines whose mistakes read like every other mistake."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ftlib.config.tree import scalar
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

    def add_template_arg(self) -> None:
        """`--template-arg KEY=VALUE`, several times: `args.template_arg` is a mapping."""
        text = "a variable of the chat template: enable_thinking=false"
        self.add_argument("--template-arg", action=_Pairs, default={}, metavar="KEY=VALUE", help=text)

    def error(self, message: str) -> NoReturn:
        raise self._mistake(message)

    def _mistake(self, message: str) -> UserError:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        return UserError(f"{self.prog}: {message}", fix=usage)


class _Pairs(argparse.Action):
    """A mapping of names to what a YAML file would read from their values."""

    def __call__(self, parser: Parser, args: argparse.Namespace, word: Any, option: str | None = None) -> None:
        name, equals, value = word.partition("=")
        if not name or not equals:
            parser.error(f"argument {option}: expected KEY=VALUE, got {word!r}")
        setattr(args, self.dest, {**getattr(args, self.dest), name: scalar(value)})


def result_file(name: str | None) -> Path | None:
    """Where `--out` writes, None without it; UserError, before any work is done, where it could not."""
    out = None if name is None else Path(os.path.expanduser(name))
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        why = "is a folder" if out.is_dir() else "lies in no folder that exists"
        raise UserError(f"{out} {why}", where="--out", fix="name a file")
    return out
