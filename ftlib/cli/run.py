"""Run a recipe: one that ships with ftlib (`tune ls`) or any file.

    tune run RECIPE --config FILE [--config FILE …] [key=value …] [~key …]
    tune run --nproc-per-node N [other options of torchrun] RECIPE --config FILE …

Without options of torchrun the file runs in this very process, so that breakpoint() works. With them everything is
checked here first, then N processes start on this node. Exit codes: 0 done, 2 a mistake in what was asked,
75 saved after a signal (the same command goes on), 76 no progress.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli import recipe
from ftlib.errors import UserError

_USAGE = "tune run [--nproc-per-node N] RECIPE --config FILE [key=value …]"


def main(argv: Sequence[str]) -> int:
    """`tune run [torchrun options] RECIPE --config F [k=v …]`"""
    argv = list(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if not argv or argv[0] == "--config" or argv[0].startswith("--config="):
        raise UserError("tune run: the recipe comes before --config", fix=_USAGE)
    if argv[0].startswith("-"):
        from ftlib.cli import spawn  # imports torch

        return spawn.main(argv)
    name, rest = argv[0], argv[1:]
    late = next((word for word in rest if word.startswith("--n") or word in ("--standalone", "--no-python")), None)
    if late:
        raise UserError(f"tune run: {late} comes before the recipe", fix=_USAGE)
    return run_here(recipe.find(name), recipe.with_shipped_configs(rest))


def run_here(path: Path, argv: Sequence[str]) -> int:
    """Run the file as `python FILE ARGS` would, in this process; returns its exit code."""
    before = sys.argv, sys.path
    sys.argv = [str(path), *argv]
    sys.path = [str(path.resolve().parent), str(Path.cwd()), *sys.path]
    try:
        runpy.run_path(str(path), run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    finally:
        sys.argv, sys.path = before
