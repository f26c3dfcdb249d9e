"""Find a function by the name a config gives it: no base class, no registration call.

`name` is one of ours or an entry point of the group `ftlib.<group>`; `pkg.mod:name` and `./file.py:name` are the user's
own. Only what holds a `:` is ever imported by path: a bare dotted name in a shared config runs nothing.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
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
    names = sorted([*builtin, *installed])
    raise UserError(
        f"{group}: there is none named {ref!r}{did_you_mean(ref, names)}",
        fix=f"one of {', '.join(names) or '(none installed)'}, or your own as ./file.py:name or package.module:name",
    )


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file by its path, once per process; its folder is importable while it loads.

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


def digest(ref: str, found: Callable) -> str:
    """SHA-256 of the file in which `ref` found `found`, as it is now."""
    place = ref.rpartition(":")[0]
    file = os.path.expanduser(place) if place.endswith(".py") else sys.modules[found.__module__].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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
