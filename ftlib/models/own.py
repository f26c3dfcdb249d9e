"""A decoder class of the user's own (`model.code` of a config): which models of a run it reads."""

from pathlib import Path

from torch import nn

from ftlib import plugins
from ftlib.models import families, hub
from ftlib.models.arch import Arch
from ftlib.sections import Model


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
