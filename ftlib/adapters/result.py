"""What a run that trains an adapter leaves in `final/`."""

from pathlib import Path

from ftlib.adapters import merge, peft_format
from ftlib.models import LanguageModel, hub, save_pretrained


def save(model: LanguageModel, folder: Path, base: str, *, write: bool) -> None:
    """Write the adapter in PEFT's format for `base`, the `model.path` of the run; or the whole model, merged, where
    adapters were merged while it trained (ftlib.adapters.relora): the last of them belongs on weights that are nowhere
    else. Every process of a sharded model must call this; the one with `write` touches the disk."""
    if getattr(model, "relora", None) is not None:
        merge.merge_into(model)
        save_pretrained(model, folder, write=write)
        return
    origin, revision = hub.origin(base)
    peft_format.save(model, folder, base=origin, revision=revision, write=write)
