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


def main(argv: Sequence[str]) -> int:
    """`tune run [torchrun options] RECIPE --config F [k=v …]`"""
    argv = list(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if recipe.starts_processes("run", argv):
        from ftlib.cli import spawn  # imports torch

        return spawn.main(argv)
    return run_here(recipe.find(argv[0]), recipe.with_shipped_configs(argv[1:]))


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
