"""Write the key-by-key table of configs/README.md from the tables that `tune import` uses.

    python tools/make_import_table.py [--check]      --check writes nothing; exit code 1 if the file is out of date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.config.imports import LIBRARIES  # noqa: E402 - after the path is set
from ftlib.config.imports.rules import Rule  # noqa: E402

FILE = ROOT / "configs" / "README.md"
BEGIN, END = "<!-- made by tools/make_import_table.py -->", "<!-- end -->"


def table() -> str:
    """The four tables."""
    parts = []
    for library in LIBRARIES.values():
        lines = [f"### {library.name}", "", "| key | here |", "|---|---|"]
        rows = {key: _meaning(rule) for key, rule in library.rules.items()}
        rows |= {key: note for key, note in library.together.items() if note}
        lines += [f"| `{key}` | {_escaped(text)} |" for key, text in sorted(rows.items())]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _meaning(rule: Rule) -> str:
    if rule.to:
        return f"`{rule.to}`" + (f" ({rule.note})" if rule.note else "")
    return ("none: " if rule.lost else "not needed: ") + rule.note


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def wanted() -> str:
    """The whole file, its table replaced."""
    before, _, rest = FILE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write, or with `--check` compare."""
    text = wanted()
    stale = text != FILE.read_text(encoding="utf-8")
    if stale and "--check" not in sys.argv:
        FILE.write_text(text, encoding="utf-8")
    print("out of date" if stale else "up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
