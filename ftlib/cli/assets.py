"""The recipes and configs that ship with ftlib: beside the package in a source tree, inside it in a wheel."""

import ast
import difflib
import hashlib
import os
from pathlib import Path

import ftlib
from ftlib.errors import UserError, did_you_mean

_SUFFIX = {"recipes": ".py", "configs": ".yaml"}
_SCHEMA = "# yaml-language-server: $schema="


def source_root() -> Path | None:
    """The source tree this package runs from, or None when it is installed."""
    root = Path(ftlib.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "recipes").is_dir() else None


def shipped(kind: str) -> dict[str, Path]:
    """Name (`recipes/lora_sft.py`) -> file; `kind` is `recipes` or `configs`."""
    root = source_root() or Path(ftlib.__file__).resolve().parent
    files = sorted((root / kind).rglob(f"*{_SUFFIX[kind]}"))
    return {path.relative_to(root).as_posix(): path for path in files if not path.name.startswith("_")}


def resolve_recipe(name: str) -> Path:
    """A recipe on disk, else a shipped one: `recipes/lora_sft.py`, `lora_sft.py` and `lora_sft` are the same."""
    return _resolve("recipes", name)


def resolve_config(name: str) -> Path:
    """A config on disk, else a shipped one: `configs/demo_lora.yaml` and `demo_lora` are the same."""
    return _resolve("configs", name)


def _resolve(kind: str, name: str) -> Path:
    what = kind[:-1]
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    found = find_shipped(kind, name)
    if found:
        return found[1]
    if path.is_dir():
        inside = [item.name for item in sorted(path.glob(f"*{_SUFFIX[kind]}"))[:5]]
        fix = f"name one of its files: {', '.join(inside)}" if inside else "name a file"
        raise UserError(f"{name}: is a folder, not a {what}", fix=fix)
    raise UserError(
        f"{name}: no such {what}{suggestion(kind, name)}",
        where=f"neither in {Path.cwd()} nor among those that ship with ftlib",
        fix="`tune ls` lists those that ship",
    )


def find_shipped(kind: str, name: str) -> tuple[str, Path] | None:
    """The full name and the file of a shipped asset; folder and suffix may be left out."""
    full = name if name.startswith(f"{kind}/") else f"{kind}/{name}"
    full = full if full.endswith(_SUFFIX[kind]) else full + _SUFFIX[kind]
    path = shipped(kind).get(full)
    return (full, path) if path else None


def suggestion(kind: str, name: str) -> str:
    """A did-you-mean over files beside the one that was asked for and shipped ones."""
    suffix, folder = _SUFFIX[kind], Path(os.path.expanduser(name)).parent
    if folder.is_dir() and (near := did_you_mean(Path(name).name, [p.name for p in folder.glob(f"*{suffix}")])):
        return near
    stems = {Path(full).stem: full for full in shipped(kind)}  # what all names share would make them look alike
    near = difflib.get_close_matches(Path(name).stem, stems, n=1, cutoff=0.6)
    return f" (did you mean {stems[near[0]]!r}?)" if near else ""


def schema_line(recipe: str) -> str:
    """The comment that tells an editor which keys a config of `recipes/<recipe>.py` may have."""
    return f"{_SCHEMA}{_schemas()}/{recipe}.json"


def as_copied(path: Path) -> str:
    """The text of a shipped file as it reads in another folder: a config names its schema by a whole address."""
    return path.read_text(encoding="utf-8").replace(f"{_SCHEMA}schema/", f"{_SCHEMA}{_schemas()}/", 1)


def _schemas() -> str:
    root = source_root() or Path(ftlib.__file__).resolve().parent
    return (root / "configs" / "schema").as_uri()


def first_line(path: Path) -> str:
    """What a file says about itself: the first line of a recipe's docstring, or of a config's leading comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(text)) or ""
        return doc.split("\n")[0]
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith(("from ftlib ", "yaml-language"))), "")


def digest(text: str) -> str:
    """Twelve hex digits that identify a version of a shipped file."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
