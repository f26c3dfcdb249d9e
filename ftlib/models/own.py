"""A decoder class of the user's own (`model.code` of a config): which models it reads, and the record that it did.

Weights say nothing of the code around them: what was trained with a user's class and is loaded by the library's may be
another function. So `ftlib.json` beside the weights names the file and the SHA-256 of its content.
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ftlib import plugins
from ftlib.models import families, hub
from ftlib.models.arch import Arch
from ftlib.sections import Model

ABOUT = "ftlib.json"  # beside weights or an adapter: what else they were trained with
Mark = dict[str, str]  # {"code": "my_model.py:Decoder", "sha256": of the file}


def find(code: str | None) -> type[nn.Module] | None:
    """The class that `model.code` names; None: the library's own."""
    return plugins.find("decoders", code, {}) if code else None


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
    """The record of a `model.code`: its file's name, without the folder, and what is in it now."""
    if code is None:
        return None
    place, colon, name = code.rpartition(":")
    return {"code": f"{Path(place).name}{colon}{name}", "sha256": plugins.digest(code, find(code))}


def record(folder: Path, about: dict[str, Any]) -> None:
    """Write what else the weights or the adapter in `folder` were trained with: all that is not None."""
    if about := {key: value for key, value in about.items() if value is not None}:
        (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def recorded(folder: Path, key: str = "model.code") -> Any:
    """An entry of the record beside the weights or the adapter in `folder`, of `model.code` a Mark. None: the library's
    own way, or not known."""
    file = folder / ABOUT
    return json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None


def compare(what: Path | str, was: Mark | None, now: Mark | None, fix: str = "--code FILE.py:CLASS") -> None:
    """Say on stderr where what was trained with one class is loaded by another; `fix`: how to name a class here."""
    if was is None or (now and now["sha256"] == was["sha256"]):
        return
    said = f"note: {what} was trained with model.code {was['code']} (sha256 {was['sha256'][:12]})"
    if now is None:
        said += f"; the library's own class runs it here: {fix} names yours"
    else:
        said += f", and {now['code']} has another content (sha256 {now['sha256'][:12]})"
    print(said, file=sys.stderr)
