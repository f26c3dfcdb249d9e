"""One model family as one file: its layers, decoder and config reader in reading order, to own and to change.

The text is cut out of the library's own modules, and only what the family reaches is taken. What stays imported are
contracts the rest of the library knows a model by (`Linear`, `ExpertLinear`, the key table) and its kernels.
"""

import ast
import importlib
import inspect
import sys
from dataclasses import dataclass

from ftlib.errors import UserError, did_you_mean
from ftlib.models import families

# In reading order; the family's own module comes last.
MODULES = (
    "ftlib.layers.rope",
    "ftlib.layers.norms",
    "ftlib.layers.mlp",
    "ftlib.layers.shared_experts",
    "ftlib.layers.moe",
    "ftlib.layers.attention",
    "ftlib.models.arch",
    "ftlib.models.decoder",
    "ftlib.models.families.ropes",
    "ftlib.models.families.common",
)
KEPT = {"ExpertLinear": "ftlib.layers.moe", "choose_backend": "ftlib.layers.attention"}


@dataclass
class Piece:
    """A top-level statement: its text with the comments above it, what it defines and what it uses."""

    text: str
    defines: set[str]
    uses: set[str]
    module: str


def extract(model_type: str) -> str:
    """The Python source of the family that reads `model_type`; `Decoder` in it is for `model.code`."""
    if model_type not in families.FAMILIES:
        hint = did_you_mean(model_type, families.FAMILIES)
        fix = f"one of: {', '.join(sorted(families.FAMILIES))}"
        raise UserError(f"there is no model family {model_type!r}{hint}", fix=fix)
    family = families.FAMILIES[model_type]
    own = sys.modules[family.arch.__module__]
    variable = next(name for name, value in vars(own).items() if value is family)
    modules = [importlib.import_module(name) for name in MODULES] + [own]
    names = {module.__name__ for module in modules}
    pieces, imports = [], []
    for module in modules:
        found, outside = _split(inspect.getsource(module), module.__name__, names)
        pieces += [piece for piece in found if not piece.defines & KEPT.keys()]
        imports += outside
    imports += [f"from {module} import {name}" for name, module in KEPT.items()]
    wanted = _reached({"Decoder", variable}, pieces)
    pieces = [piece for piece in pieces if piece.defines & wanted]
    used = set().union(*(piece.uses for piece in pieces))
    doc = inspect.getdoc(own).rstrip()
    header = [f'"""{doc}', "", "Train it with", ""]
    header += ["    model.code: ./THIS_FILE.py:Decoder", '"""', ""]
    text = "\n".join(header) + "\n" + _imports(imports, used)
    for module in dict.fromkeys(piece.module for piece in pieces):
        about = inspect.getdoc(sys.modules[module]).split("\n")[0]
        text += f"\n\n# --- {about}\n\n" + "".join(p.text for p in pieces if p.module == module).strip("\n") + "\n"
    return text + f"\n\nDecoder.family = {variable}  # read in place of the library's own\n"


def _split(source: str, module: str, names: set[str]) -> tuple[list[Piece], list[str]]:
    """Statements of a module, and its imports from outside `names`, one line a name."""
    lines, pieces, imports, last = source.splitlines(keepends=True), [], [], 0
    for node in ast.parse(source).body:
        start, last = last, node.end_lineno
        if isinstance(node, ast.Import):
            imports += [f"import {a.name}" + (f" as {a.asname}" if a.asname else "") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module not in names:
                imports += [f"from {node.module} import {a.name}" for a in node.names]
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            while start < last and lines[last : last + 1] and lines[last].strip().startswith("# fmt"):
                last += 1
            pieces.append(Piece("".join(lines[start:last]), _defined(node), _used(node), module))
    return pieces, imports


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _used(node: ast.stmt) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _reached(wanted: set[str], pieces: list[Piece]) -> set[str]:
    """`wanted` and every name that its definitions use, theirs too, and so on."""
    found: set[str] = set()
    while wanted - found:
        name = (wanted - found).pop()
        found.add(name)
        wanted = wanted.union(*(piece.uses for piece in pieces if name in piece.defines))
    return found


def _imports(lines: list[str], used: set[str]) -> str:
    """The imports that are used: standard library, then torch, then ours."""
    kept = {line for line in lines if line.split()[-1].split(".")[0] in used}
    plain = sorted(line for line in kept if line.startswith("import"))
    merged: dict[str, set[str]] = {}
    for line in kept:
        if line.startswith("from"):
            _, module, _, name = line.split()
            merged.setdefault(module, set()).add(name)
    plain += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(merged.items())]
    groups: dict[int, list[str]] = {}
    for line in plain:
        top = line.split()[1].split(".")[0]
        groups.setdefault({"torch": 1, "ftlib": 2}.get(top, 0), []).append(line)
    return "\n\n".join("\n".join(groups[key]) for key in sorted(groups)) + "\n"
