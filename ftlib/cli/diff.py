"""Compare a copy made by `tune cp` with the version that ships now.

Lines with `-` are in the shipped version, lines with `+` in the copy.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from ftlib import __version__
from ftlib.cli import assets
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

_HEADER = re.compile(r"# from ftlib (\S+) (recipes|configs)/(\S+) sha256:([0-9a-f]{12})")


def main(argv: Sequence[str]) -> int:
    """`tune diff FILE`"""
    parser = Parser("diff", __doc__)
    parser.add_argument("file", metavar="FILE", help="a copy whose first line is still the one that `tune cp` wrote")
    path = Path(parser.parse(argv).file)
    try:
        header, _, mine = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    match = _HEADER.fullmatch(header.strip())
    if match is None:
        raise UserError(
            f"{path}: the first line does not say what it was copied from",
            where=f"{path}:1",
            fix="it should read `# from ftlib VERSION recipes/NAME.py sha256:…`; make the copy with `tune cp`",
        )
    version, kind, file, digest = match.groups()
    found = assets.find_shipped(kind, file)
    if found is None:
        raise UserError(f"{kind}/{file}: ftlib {__version__} no longer ships it{assets.suggestion(kind, file)}")
    name, source = found
    theirs = source.read_text(encoding="utf-8")
    if assets.digest(theirs) == digest:
        print(f"{name} has not changed since it was copied (ftlib {version}); these are your edits:")
    else:
        print(f"{name} has changed since it was copied: ftlib {version} then, {__version__} now; both sides' edits:")
    lines = list(difflib.unified_diff(theirs.splitlines(), mine.splitlines(), name, str(path), lineterm=""))
    print("\n".join(lines) if lines else "(no difference)")
    return 0
