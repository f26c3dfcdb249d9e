"""A decoder class of the user's own (`model.code` of a config): which models it reads, and the record that it did.

Weights say nothing of the code around them: what was trained with a user's class and is loaded by the library's may be
another function. So `ftlib.json` beside the weights names the file and a SHA-256 of it and of what it imports from its
own folder, and `code/` has a copy of these files.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ftlib import plugins
from ftlib.errors import UserError
from ftlib.models import families, hub
from ftlib.models.arch import Arch
from ftlib.sections import Model

ABOUT = "ftlib.json"  # beside weights or an adapter: what else they were trained with
COPIES = "code"  # a folder beside it


@dataclass(frozen=True)
class Mark:
    """The record of a `model.code`."""

    code: str  # `my_model.py:Decoder`: the file's name, without the folder
    sha256: str  # of what was in it, and in the files it imports from its folder
    files: Mapping[str, bytes] = field(default_factory=dict, compare=False)  # these, by path there, where at hand


def find(code: str | None) -> type[nn.Module] | None:
    """The class that `model.code` names; None: the library's own. UserError where it is no module of torch."""
    if not code:
        return None
    if code.endswith(".py"):
        raise UserError(f"{code!r} names a file and no class in it", fix=f"{code}:Decoder")
    found = plugins.find("decoders", code, {})
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        fix = "name a class like the Decoder that `tune cp model:qwen3 my_model.py` writes"
        raise UserError(f"{code!r} is no class of torch modules", fix=fix)
    plugins.check_call(found, ["arch"], {})
    return found


def decoder(run: Model, path: str | Path) -> type[nn.Module] | None:
    """What reads the model at `path` in a run of `run`; None: the library.

    A second model, such as a teacher, is read by the library where that knows its `model_type`, else by the run's class
    where that one does.
    """
    own = find(run.code)
    if own is None or str(path) == run.path:
        return own
    family, config = getattr(own, "family", None), hub.read_config(hub.resolve(path))
    model_type = config.get("model_type")
    return own if family and model_type in family.model_types and model_type not in families.FAMILIES else None


def arch(run: Model, path: str | Path) -> Arch:
    """The architecture of the model at `path`, as a run of `run` reads its config.json."""
    folder, family = hub.resolve(path), getattr(decoder(run, path), "family", None)
    return families.read(hub.read_config(folder), str(folder / "config.json"), family)[0]


def mark(code: str | None) -> Mark | None:
    """The record of a `model.code`, its files as they are now."""
    if code is None:
        return None
    place, colon, name = code.rpartition(":")
    files = plugins.files(code, find(code))
    return Mark(f"{Path(place).name}{colon}{name}", plugins.digest(files), files)


def record(folder: Path, about: dict[str, Any], code: Mark | None) -> None:
    """Write what else the weights or the adapter in `folder` were trained with: all that is not None."""
    about = {key: value for key, value in about.items() if value is not None}
    if code is not None:
        about["model.code"] = {"code": code.code, "sha256": code.sha256}
        for name, content in code.files.items():
            copy = folder / COPIES / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    if about:
        (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def noted(folder: Path, key: str) -> Any:
    """An entry of the record beside the weights or the adapter in `folder`; None where it has none."""
    file = folder / ABOUT
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None
    except (ValueError, AttributeError):
        raise _no_record(file) from None


def _no_record(file: Path) -> UserError:
    return UserError(f"{ABOUT} is no record of a run", where=str(file), fix="copy it again, or remove it")


def recorded(folder: Path) -> Mark | None:
    """The `model.code` that the weights or the adapter in `folder` were trained with. None: the library's own way, or
    not known."""
    if not (found := noted(folder, "model.code")):
        return None
    if not (isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("code", "sha256"))):
        raise _no_record(folder / ABOUT)
    copies = folder / COPIES
    files = {file.relative_to(copies).as_posix(): file.read_bytes() for file in sorted(copies.rglob("*.py"))}
    return Mark(found["code"], found["sha256"], files)


def compare(what: Path | str, was: Mark | None, now: Mark | None, fix: str = "--code FILE.py:CLASS") -> None:
    """Say on stderr where what was trained with one class is loaded by another; `fix`: how to name a class here."""
    if was is None or (now and now.sha256 == was.sha256):
        return
    said = f"note: {what} was trained with model.code {was.code} (sha256 {was.sha256[:12]})"
    if now is None:
        said += f"; the library's own class runs it here: {fix} names yours"
    else:
        said += f", and {now.code} has another content (sha256 {now.sha256[:12]})"
    print(said, file=sys.stderr)
