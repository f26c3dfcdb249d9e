"""Which parameters of a model train, by patterns on their names."""

import re

from torch import nn

from ftlib.errors import UserError
from ftlib.models.keys import Table, piece
from ftlib.sections import Train


def apply(model: nn.Module, cfg: Train) -> int:
    """Freeze everything outside `cfg.only` (empty: nothing) and everything in `cfg.freeze`; returns how many train.

    Names are those of the checkpoint. A tied head and embedding are one parameter: naming either names both. Works on
    the meta device.
    """
    table = getattr(model, "table", Table())
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(piece(name, table).hf)
        parameters[id(parameter)] = parameter
    every = [name for found in names.values() for name in found]
    for key in ("only", "freeze"):
        for pattern in getattr(cfg, key):
            if not any(_found(pattern, name, key) for name in every):
                raise UserError(
                    f"no parameter's name contains {pattern!r}",
                    where=f"train.{key}",
                    fix=f"names here: {', '.join(every[:2])} … {every[-1]}",
                )
    trained = 0
    for identity, parameter in parameters.items():
        mine = names[identity]
        chosen = not cfg.only or any(_found(pattern, name, "only") for pattern in cfg.only for name in mine)
        chosen = chosen and not any(_found(pattern, name, "freeze") for pattern in cfg.freeze for name in mine)
        parameter.requires_grad_(chosen)
        trained += chosen
    if not trained:
        raise UserError("every parameter is frozen", where="train.only, train.freeze", fix="leave something to train")
    return trained


def _found(pattern: str, name: str, key: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}", where=f"train.{key}") from None
