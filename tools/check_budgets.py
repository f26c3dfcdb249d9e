"""Checks the rules of the house that a machine can check; prints breaches as `file:line: what` and then exits 1.

    python tools/check_budgets.py [--root .]

Sizes of recipes, files, functions, families and configs; blocks repeated between recipes; imports and calls that are
not allowed; what may lie at the top level; which package may import which. Standard library only.
"""

import argparse
import ast
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

RECIPE_LINES, SFT_LINES, FILE_LINES = 300, 200, 400
FUNCTION_LINES, FAMILY_LINES, CONFIG_LINES, REPEATED_LINES = 60, 60, 40, 25
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", ".gitignore", ".ci"}
TOP_LEVEL |= {"recipes", "configs", "ftlib", "tests", "tools"}
NEVER_IMPORTED = {"transformers", "peft", "trl", "accelerate", "bitsandbytes"}
# Importer -> packages of ftlib it must not reach, directly. Recipes are out of reach for all.
ARROWS = {
    "kernels": {"layers", "models", "adapters", "losses", "quant", "parallel", "build", "cli"},
    "layers": {"models", "adapters", "losses", "parallel", "build", "cli"},
    "models": {"parallel", "build", "cli"},
    "adapters": {"parallel", "build", "cli"},
    "losses": {"parallel", "build", "cli"},
    "quant": {"parallel", "build", "cli"},
    "parallel": {"models", "build", "cli"},
}
NOWHERE = ("cli", "recipes")  # rooms that nothing below imports


class Breach(NamedTuple):
    """A rule that is broken, and where."""

    path: Path
    line: int
    what: str


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python_files(root: Path, *folders: str) -> list[Path]:
    """Python files below the folders, in order."""
    found = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def sizes(root: Path) -> Iterator[Breach]:
    """Files, functions, families, recipes and configs that grew too long."""
    limits = [(path, FILE_LINES, "a file") for path in python_files(root, "ftlib", "tools", "tests")]
    limits += [
        (p, SFT_LINES, "an SFT recipe") if "sft" in p.stem else (p, RECIPE_LINES, "a recipe")
        for p in python_files(root, "recipes")
    ]
    limits += [(path, CONFIG_LINES, "a config") for path in sorted((root / "configs").rglob("*.yaml"))]
    for path in python_files(root, "ftlib/models/families"):
        names = (
            t.id
            for node in parse(path).body
            if isinstance(node, ast.Assign)
            for t in node.targets
            if isinstance(t, ast.Name)
        )
        if "FAMILY" in names:
            limits.append((path, FAMILY_LINES, "a family"))
    for path, limit, kind in limits:
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > limit:
            yield Breach(path, count, f"{count} lines; {kind} has at most {limit}")
    for path in python_files(root, "ftlib", "recipes", "tools"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > FUNCTION_LINES:
                    yield Breach(
                        path, node.lineno, f"{node.name} has {count} lines; a function has at most {FUNCTION_LINES}"
                    )


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines that count as code: no imports, docstrings, comments or blank lines."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_import or is_text:
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kept = ((number, line.strip()) for number, line in enumerate(lines, 1) if number not in skipped)
    return [(number, line) for number, line in kept if line]


def repeats(root: Path) -> Iterator[Breach]:
    """The first block of REPEATED_LINES consecutive equal code lines of each two recipes."""
    lines = {path: code_lines(path) for path in python_files(root, "recipes")}
    for first, second in combinations(lines, 2):
        blocks = {}
        for path in (first, second):
            texts = [text for _, text in lines[path]]
            starts = range(len(texts) - REPEATED_LINES, -1, -1)
            blocks[path] = {tuple(texts[i : i + REPEATED_LINES]): lines[path][i][0] for i in starts}
        shared = sorted(blocks[first][block] for block in blocks[first].keys() & blocks[second].keys())
        if shared:
            what = f"{REPEATED_LINES} code lines from here are also in {second.name}: move what they share to ftlib"
            yield Breach(first, shared[0], what)


def full_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of what the file imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` -> `numpy.load`; an empty string for what is no chain of names."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return before and f"{before}.{node.attr}"
    return ""


def unsafe(call: ast.Call, name: str) -> str | None:
    """Why a call may run code that lies in a file, or nothing."""
    given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib"} and name.split(".")[-1] in {
        "load",
        "loads",
        "Unpickler",
    }:
        return f"{name} runs code that lies in the file"
    if given.get("weights_only", True) is not True:
        return "weights_only=False runs code that lies in the file"
    if name == "torch.load" and "weights_only" not in given:
        return "torch.load without weights_only=True"
    if name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}:
        return f"{name}: use yaml.safe_load"
    if name == "numpy.load" and given.get("allow_pickle", False) is not False:
        return "numpy.load with allow_pickle runs code that lies in the file"
    return None


def imports_and_calls(root: Path) -> Iterator[Breach]:
    """Libraries we are measured against, and loaders that run what they load."""
    for path in python_files(root, "ftlib", "recipes"):
        tree = parse(path)
        names = full_names(tree)
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            elif isinstance(node, ast.Call):
                name = dotted(node.func, names)
                if why := unsafe(node, name):
                    yield Breach(path, node.lineno, why)
                text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                if name in {"importlib.import_module", "__import__"} and isinstance(text, str):
                    found = [text]
            for module in found:
                if module.split(".")[0] in NEVER_IMPORTED:
                    yield Breach(path, node.lineno, f"imports {module}: a library we are measured against, tests only")


def top_level(root: Path) -> Iterator[Breach]:
    """Files and folders at the top that have no place there; in a checkout only what git would track counts."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        names = {name.strip('"').split("/")[0] for name in listed}
    else:
        names = {path.name for path in root.iterdir() if not path.name.startswith(".venv")}
    for name in sorted(names - TOP_LEVEL):
        yield Breach(root / name, 1, "has no place at the top level")


def module_edges(root: Path) -> Iterator[tuple[str, str, Path, int]]:
    """(importing module, imported module of ftlib or recipes, file, line), imports inside functions included."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files(root, "ftlib")
    }
    for name, path in modules.items():
        here = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(parse(path)):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    base = ".".join(
                        filter(None, [*here.split(".")[: len(here.split(".")) - node.level + 1], node.module])
                    )
                deeper = [f"{base}.{alias.name}" for alias in node.names]
                targets = [target if target in modules else base for target in deeper]
            for target in targets:
                if target.split(".")[0] in {"ftlib", "recipes"}:
                    yield name, target, path, node.lineno


def room(module: str) -> str:
    """The package of a module: `ftlib.models.keys` -> `models`; the top of ftlib itself is ``."""
    parts = module.split(".")
    return "recipes" if parts[0] == "recipes" else (parts[1] if len(parts) > 1 else "")


def arrows(root: Path) -> Iterator[Breach]:
    """Imports against the arrows, and circles between packages (what cli imports inside functions apart)."""
    graph: dict[str, dict[str, tuple[Path, int]]] = {}
    for module, target, path, line in module_edges(root):
        here, there = room(module), room(target)
        if there == here or not there:
            continue
        if (
            there in ARROWS.get(here, ())
            or (there in NOWHERE and here not in ("", "__main__", "cli", "launch"))
            or there == "recipes"
        ):
            yield Breach(path, line, f"{here or 'ftlib'} imports {there}, against the arrows")
        if here != "cli":
            graph.setdefault(here, {}).setdefault(there, (path, line))
    for circle in circles({here: set(targets) for here, targets in graph.items()}):
        path, line = graph[circle[0]][circle[1]]
        yield Breach(path, line, "a circle of imports: " + " -> ".join(circle))


def file_circles(root: Path) -> Iterator[Breach]:
    """Files of one package that import each other, round any number of corners, in functions too."""
    graph: dict[str, dict[str, tuple[Path, int]]] = {}
    for module, target, path, line in module_edges(root):
        if room(module) == room(target):
            graph.setdefault(module, {}).setdefault(target, (path, line))
    for circle in circles({module: set(targets) for module, targets in graph.items()}):
        path, line = graph[circle[0]][circle[1]]
        yield Breach(path, line, "files import each other: " + " -> ".join(circle))


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """For every node that can reach itself, its shortest way round, each circle once."""
    seen: set[frozenset[str]] = set()
    for start in sorted(graph):
        ways, found = [[start]], None
        visited: set[str] = set()
        while ways and not found:
            way = ways.pop(0)
            for target in sorted(graph.get(way[-1], ())):
                if target == start:
                    found = [*way, start]
                    break
                if target not in visited:
                    visited.add(target)
                    ways.append([*way, target])
        if found and frozenset(found) not in seen:
            seen.add(frozenset(found))
            yield found


def check(root: Path) -> list[Breach]:
    """Every breach below `root`."""
    rules = (sizes, repeats, imports_and_calls, top_level, arrows, file_circles)
    return [breach for rule in rules for breach in rule(root)]


def main() -> int:
    """Reads the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    root = parser.parse_args().root.resolve()
    breaches = check(root)
    for breach in breaches:
        print(f"{breach.path.relative_to(root)}:{breach.line}: {breach.what}")
    count = len(python_files(root, "ftlib", "recipes", "tools", "tests"))
    print(f"budgets: {count} files, {len(breaches) or 'no'} breach{'' if len(breaches) == 1 else 'es'}")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
