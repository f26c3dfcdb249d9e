"""The tables of what `dpo.loss` and `algorithm.preset` name, in ftlib/preference/README.md and ftlib/rl/README.md.

    python tools/method_tables.py [--check]      --check writes nothing; exit code 1 if a table is out of date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.losses import preference as losses  # noqa: E402 - after the path is set
from ftlib.preference.objective import resolve  # noqa: E402
from ftlib.rl import presets  # noqa: E402
from ftlib.sections import Dpo  # noqa: E402
from ftlib.sections.methods import METHODS, NAMES, PRESETS, preset  # noqa: E402
from ftlib.sections.rl import Algorithm, Rollout  # noqa: E402

START, END = "<!-- tools/method_tables.py -->", "<!-- end -->"
SOURCES = {  # of what is more than one loss
    "rpo": "Pang et al. 2024, arXiv 2404.19733", "mpo": "Wang et al. 2024, arXiv 2411.10442",
    "ld_dpo": "Liu et al. 2024, arXiv 2409.06411", "wpo": "Zhou et al. 2024, arXiv 2406.11827",
}  # fmt: skip


def preferences() -> list[str]:
    """Markdown: each name, its formula with the constants it has by default, where it is from."""
    lines = ["| `dpo.loss` | of a pair | from |", "|---|---|---|"]
    for name in NAMES:
        reads = "" if any(METHODS[term].reference for term in preset(name).terms) else "; no reference"
        text = resolve(Dpo(loss=name)).formula.replace("|", "\\|")
        lines.append(f"| `{name}` | `{text}`{reads} | {_source(name)} |")
    return lines


def _source(name: str) -> str:
    """What the docstring of the loss says, or of the loss that a preset is made of."""
    if name in SOURCES:
        return SOURCES[name]
    first = next(iter(PRESETS[name].terms)) if name in PRESETS and name not in METHODS else name
    return " ".join((getattr(losses, first).__doc__ or "").split()).rstrip(".").replace("|", "\\|")


def algorithms() -> list[str]:
    """Markdown: each preset as the formula that a run with it prints."""
    lines = ["| `algorithm.preset` | what it optimises |", "|---|---|"]
    for name in presets.PRESETS:
        first, *rest = presets.formula(Algorithm(preset=name), Rollout())[1:]
        text = [first.partition(";")[0], *rest]
        lines.append(f"| `{name}` | {'<br>'.join(line.strip().replace('|', chr(92) + '|') for line in text)} |")
    return lines


def texts() -> dict[Path, str]:
    """File -> what it should hold."""
    found = {}
    for folder, lines in (("preference", preferences()), ("rl", algorithms())):
        file = ROOT / "ftlib" / folder / "README.md"
        before, _, rest = file.read_text(encoding="utf-8").partition(START)
        found[file] = "\n".join([before + START, *lines, END]) + rest.partition(END)[2]
    return found


def main() -> int:
    """Write, or with `--check` compare."""
    stale = [file for file, text in texts().items() if file.read_text(encoding="utf-8") != text]
    for file in () if "--check" in sys.argv else stale:
        file.write_text(texts()[file], encoding="utf-8")
    print(f"out of date: {', '.join(map(str, stale))}" if stale else "all up to date")
    return 1 if "--check" in sys.argv and stale else 0


if __name__ == "__main__":
    sys.exit(main())
