"""List the recipes and configs that ship with ftlib."""

import shutil
import sys
from collections.abc import Sequence

from ftlib.cli import assets
from ftlib.cli.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """`tune ls`"""
    Parser("ls", __doc__).parse(argv)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    groups = {kind: assets.shipped(kind) for kind in ("recipes", "configs")}
    longest = max((len(name) for files in groups.values() for name in files), default=0)
    for kind, files in groups.items():
        print(kind)
        for name, path in files.items():
            print(f"  {name:<{longest}}  {assets.first_line(path)}"[:width].rstrip())
    return 0
