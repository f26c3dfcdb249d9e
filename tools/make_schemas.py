"""Write configs/schema/<recipe>.json for every recipe that ships.

    python tools/make_schemas.py [--check]      --check writes nothing; exit code 1 if a file is out of date
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.cli import assets  # noqa: E402 - after the path is set
from ftlib.cli.help import schema_of  # noqa: E402

FOLDER = ROOT / "configs" / "schema"


def texts() -> dict[Path, str]:
    """File -> what it should hold."""
    recipes = [path.stem for path in assets.shipped("recipes").values()]
    schemas = {name: json.dumps(schema_of(name), indent=1, ensure_ascii=False) for name in recipes}
    return {FOLDER / f"{name}.json": f"{text}\n" for name, text in schemas.items()}


def main() -> int:
    """Write, or with `--check` compare."""
    wanted, stale = texts(), []
    for file, text in wanted.items():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(file.name)
        if "--check" not in sys.argv:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    extra = [file.name for file in FOLDER.glob("*.json") if file not in wanted]
    print(f"out of date: {', '.join(stale)}" if stale else "all up to date", *(f"no recipe: {name}" for name in extra))
    return 1 if "--check" in sys.argv and (stale or extra) else 0


if __name__ == "__main__":
    sys.exit(main())
