"""Find a function by the name a config gives it: no base class, no registration call.

`name` is one of ours or an entry point of the group `ftlib.<group>`; `pkg.mod:name` and `./file.py:name` are the user's
own. Only what holds a `:` is ever imported by path: a bare dotted name in a shared config runs nothing.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ftlib.errors import UserError, did_you_mean

_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def find(group: str, ref: str, builtin: Mapping[str, Callable]) -> Callable:
    """The function (or class) that `ref` names; `builtin` are the library's own of this group.

    Raises `UserError` if there is none, or if its module cannot be imported.
    """
    if ":" in ref:
        place, _, name = ref.rpartition(":")
        module = load_file(place) if place.endswith(".py") else _import(place, ref)
        return _member(module, name, ref)
    if ref in builtin:
        return builtin[ref]
    installed = {entry.name: entry for entry in entry_points(group=f"ftlib.{group}")}
    if ref in installed:
        try:
            return installed[ref].load()
        except Exception as error:
            raise UserError(
                f"{group}: the plug-in {ref!r} ({installed[ref].value}) cannot be imported: {_reason(error)}",
                fix="install or mend the package that provides it",
            ) from error
    if ref.endswith(".py"):
        raise UserError(f"{ref} names a file and no function in it", fix=f"write {ref}:function")
    names = sorted([*builtin, *installed])
    raise UserError(
        f"{group}: there is none named {ref!r}{did_you_mean(ref, names)}",
        fix=f"one of {', '.join(names) or '(none installed)'}, or your own as ./file.py:name or package.module:name",
    )


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file by its path, once per process; what lies beside it is importable while it loads, as `x` and
    as `.x`.

    Raises `UserError` with the file and line of whatever goes wrong in it.
    """
    file = Path(os.path.expanduser(path)).resolve()
    if not file.is_file():
        raise UserError(f"no such file: {path} (working directory {Path.cwd()})")
    name = f"{_package(file.parent)}.{file.stem.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up here
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{_place(error, file)}: {_reason(error)}", fix="mend the file: it fails on import") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def files(ref: str, found: Callable) -> dict[str, bytes]:
    """The file in which `ref` found `found`, first, and what it imports, directly or not, from its own folder and below
    (by the import statements, ftlib left out): path within that folder -> content."""
    place = ref.rpartition(":")[0]
    if place.endswith(".py"):
        main = Path(os.path.expanduser(place)).resolve()
        root = main.parent
    else:
        main = Path(sys.modules[found.__module__].__file__).resolve()
        root = (main.parent if main.name == "__init__.py" else main).parents[found.__module__.count(".")]
    known, waiting = {}, [main]
    while waiting:
        file = waiting.pop()
        key = file.relative_to(main.parent).as_posix()
        if key not in known:
            known[key] = file
            waiting += [one for one in _imported(file, root) if one.is_relative_to(main.parent)]
    return {name: file.read_bytes() for name, file in ({main.name: main} | dict(sorted(known.items()))).items()}


def digest(code: Mapping[str, bytes]) -> str:
    """SHA-256 of what `files` gave: of the one content, or of the names and contents of several; the first one's name
    does not count."""
    each = [hashlib.sha256(content).hexdigest() for content in code.values()]
    named = "".join(f"{name} {sha256}\n" for name, sha256 in zip(["", *list(code)[1:]], each, strict=True))
    return each[0] if len(each) == 1 else hashlib.sha256(named.encode()).hexdigest()


def check_call(fn: Callable, required: Iterable[str], kwargs: Mapping[str, object], where: str | None = None) -> None:
    """Check, before anything is computed, that `fn` can be called with the positional `required` and with `kwargs`.

    `required` names what the library will pass; `where` is the config key that `kwargs` come from. Raises `UserError`
    that quotes the signature.
    """
    required = list(required)
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(*required, **kwargs)
    except TypeError as error:
        unknown = [key for key in kwargs if key not in signature.parameters]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        name = f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', fn)}"
        raise UserError(
            f"{name}{signature}: {error}{hint}",
            where=where,
            fix=f"it is called with ({', '.join([*required, *(f'{key}=…' for key in kwargs)])})",
        ) from None


@contextmanager
def told(fn: Callable, ref: str, where: str, fix: str = "mend the function") -> Iterator[None]:
    """What the user's `fn` raises inside, as a `UserError` with its file and line; `ref` is its name in the config and
    `where` the key. What is out of memory stays as it is, for the run to explain."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        code = getattr(inspect.unwrap(fn), "__code__", None)
        place = _place(error, Path(code.co_filename) if code else None)
        raise UserError(f"{ref} failed: {_reason(error)} ({place})", where=where, fix=fix) from error


def _package(folder: Path) -> str:
    """The package that stands for a folder, so that its files can import each other as `.x`."""
    name = f"ftlib_file_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    return name


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """The files that a file's import statements name; absolute names start from `root`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # nothing has imported it yet
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one for alias in node.names for one in _modules(root, alias.name))
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(file.parents):  # nothing has run it yet
                continue
            start = file.parents[node.level - 1] if node.level else root
            if node.level and (start / "__init__.py").is_file():
                yield start / "__init__.py"
            for alias in node.names:
                yield from _modules(start, f"{node.module}.{alias.name}" if node.module else alias.name)


def _modules(start: Path, name: str) -> Iterator[Path]:
    """The files that importing `name` runs, as far as they are below `start`; its last part may be no module."""
    for part in [] if name.split(".")[0] == "ftlib" else name.split("."):
        if (start / f"{part}.py").is_file() and not (start / part / "__init__.py").is_file():
            yield start / f"{part}.py"
            return
        start = start / part
        if (start / "__init__.py").is_file():
            yield start / "__init__.py"


def _import(place: str, ref: str) -> ModuleType:
    top = place.partition(".")[0]
    if not _MODULE.fullmatch(place):
        raise UserError(f"{ref!r} names no function", fix="write package.module:name or ./file.py:name")
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        raise UserError(f"{ref!r}: Python's own modules are no plug-ins", fix="name a function of your package or file")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            fix = "install it, or name a file as ./file.py:name"
            raise UserError(f"{ref!r}: there is no module {error.name!r}", fix=fix) from None
        raise UserError(f"{ref!r} cannot be imported: {_reason(error)}") from error
    except Exception as error:
        raise UserError(f"{ref!r} cannot be imported: {_place(error)}: {_reason(error)}") from error


def _member(module: ModuleType, name: str, ref: str) -> Callable:
    found = getattr(module, name, None)
    if found is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{ref!r}: {module.__file__} defines no {name!r}{did_you_mean(name, names)}")
    if not callable(found):
        raise UserError(f"{ref!r} is no function but {type(found).__name__}")
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def _place(error: Exception, file: Path | None = None) -> str:
    """`file:line` of the innermost frame in `file` (of any file when none is given)."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if file is None or f.filename == str(file)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)
