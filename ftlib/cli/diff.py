"""Compare a copy made by `tune cp` with the version that ships now.

Lines with `-` are in the shipped version, lines with `+` in the copy.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from ftlib import __version__
from ftlib.cli import copies
from ftlib.cli.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """`tune diff FILE`"""
    parser = Parser("diff", __doc__)
    parser.add_argument("file", metavar="FILE", help="a copy whose first line is still the one that `tune cp` wrote")
    copy = copies.read(Path(parser.parse(argv).file))
    if copy.changed:
        print(f"{copy.name} has changed since it was copied: ftlib {copy.version} then, {__version__} now; both sides' "
              "edits (`tune update` merges them):")  # fmt: skip
    else:
        print(f"{copy.name} has not changed since it was copied (ftlib {copy.version}); these are your edits:")
    theirs, mine = copy.theirs.splitlines(), copy.text.splitlines()
    lines = list(difflib.unified_diff(theirs, mine, copy.name, str(copy.path), lineterm=""))
    print("\n".join(lines) if lines else "(no difference)")
    return 0
