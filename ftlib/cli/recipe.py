"""What `run` and `validate` share: a recipe's file, its module, its config, and the checks before anything starts."""

import ast
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib import config, plugins
from ftlib.cli import assets
from ftlib.errors import Problems, UserError

_SHAPE = "a recipe defines `class Config` and `def main(cfg)`, and ends with\n" \
    '       if __name__ == "__main__": launch(Config, main)'


_CONFIGS, _ROWS = (".yaml", ".yml"), (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")


def starts_processes(verb: str, argv: Sequence[str]) -> bool:
    """Whether options of torchrun stand before the recipe. `UserError` where there is no recipe, or where they come
    after it."""
    usage = f"tune {verb} [--nproc-per-node N] RECIPE --config FILE [key=value …]"
    if not argv or argv[0].partition("=")[0] == "--config":
        raise UserError(f"tune {verb}: the recipe comes before --config", fix=usage)
    if argv[0].startswith("-"):
        return True
    late = next((word for word in argv if word.startswith("--n") or word in ("--standalone", "--no-python")), None)
    if late:
        raise UserError(f"tune {verb}: {late.partition('=')[0]} comes before the recipe", fix=usage)
    return False


def find(name: str, verb: str = "run") -> Path:
    """The file of a recipe, looked at but not run. Raises `UserError` when it is none; `verb`: for its advice."""
    path = assets.resolve_recipe(name)
    if path.suffix in _CONFIGS:
        fix = f"the recipe comes first: tune {verb} RECIPE --config {name}"
        raise UserError(f"{path}: is no recipe but a config", fix=fix)
    if path.suffix in _ROWS:
        fix = f"tune {verb} RECIPE --config FILE, where FILE names the rows; tune doctor {name} looks at rows alone"
        raise UserError(f"{path}: is no recipe but a file of rows", fix=fix)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except ValueError as error:  # null bytes
        raise UserError(f"{path}: is not a Python file: {error}") from None
    names = {name for statement in tree.body for name in _bound(statement)}
    missing = [what for what in ("Config", "main") if what not in names]
    if missing:
        raise UserError(f"{path}: is no recipe, it defines no {' and no '.join(missing)}", fix=_SHAPE)
    if not any(isinstance(node, ast.Constant) and node.value == "__main__" for node in ast.walk(tree)):
        raise UserError(f"{path}: does nothing when it is run", fix=_SHAPE)
    return path


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []


def load(path: Path) -> ModuleType:
    """The module of a recipe, imported without running it."""
    module = plugins.load_file(path)
    if not dataclasses.is_dataclass(module.Config) or not callable(module.main):
        raise UserError(f"{path}: Config must be a dataclass and main a function", fix=_SHAPE)
    return module


def with_shipped_configs(argv: Sequence[str]) -> list[str]:
    """The arguments of a recipe, each `--config` turned into the file it names: on disk, else shipped."""
    result = list(argv)
    for i, word in enumerate(result):
        if word.startswith("--config="):
            result[i] = f"--config={assets.resolve_config(word.removeprefix('--config='))}"
        elif i and result[i - 1] == "--config":
            result[i] = str(assets.resolve_config(word))
    return result


def check(path: Path, argv: Sequence[str], world: int) -> list[str]:
    """Everything that can be checked before training: the config, then what it says about model, tokenizer and data.

    `world` is the number of processes. Raises `UserError`; returns what a run would say of its rows.
    """
    module = load(path)
    cfg, places = config.read(module.Config, argv)
    with places.told():
        return _check(cfg, getattr(module, "check", None), world)


def _check(cfg: Any, own_check: Callable[..., None] | None, world: int) -> list[str]:
    said: list[str] = []
    parts = [] if own_check is None else [lambda: said.extend(own_check(cfg, world=world) or ())]
    if hasattr(cfg, "model"):  # what has no model has nothing that the library could check
        from ftlib import build  # imports torch

        parts = parts or [lambda: build.check(cfg, world=world)]
        parts.append(lambda: said.extend(build.check_data(cfg)))
    problems = []
    for part in parts:
        try:
            part()
        except UserError as error:
            problems += error.problems if isinstance(error, Problems) else [str(error)]
    if problems:
        raise Problems(dict.fromkeys(problems))  # a missing model is a missing tokenizer too
    return said
