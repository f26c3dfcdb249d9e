"""A run's checkpoint -> a model, on the CPU and without the processes that wrote it. Imports torch."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ftlib.adapters import lora
from ftlib.checkpoint.verify import verify
from ftlib.config.build import build
from ftlib.config.tree import from_plain
from ftlib.errors import Problems, UserError
from ftlib.models import LanguageModel
from ftlib.sections import Lora

PREFIX = "model."


def is_checkpoint(folder: Path) -> bool:
    """Whether it is a `checkpoints/step_N` of a run."""
    return (folder / "state.json").is_file() and (folder / "MANIFEST.json").is_file()


@torch.no_grad()
def fill(model: LanguageModel, folder: Path) -> bool:
    """Put the parameters of a checkpoint into a model that has the base's weights; true if they are an adapter's.

    Raises UserError when files are damaged, or when the model is not the one that was trained.
    """
    if problem := verify(folder):
        raise UserError(f"{folder} is damaged: {problem}", fix="take another step's, or a copy of it")
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    names = {name: name.removeprefix(PREFIX) for name in saved if name.startswith(PREFIX)}
    has_adapter = any(".adapters." in name for name in names)
    if has_adapter:
        lora.attach_section(model, _lora_section(folder))
    state = model.state_dict(keep_vars=True)
    unknown = [ours for ours in names.values() if ours not in state]
    wrong = [ours for name, ours in names.items() if ours in state and state[ours].shape != saved[name].size]
    if unknown or wrong:
        what = f"the checkpoint does not fit this model: {', '.join((unknown + wrong)[:3])}"
        raise UserError(what, where=str(folder), fix="name the model that the run started from")
    read = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is meant
        dcp.load(read, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, ours in names.items():
        state[ours].copy_(read[name])
    return has_adapter


def _lora_section(folder: Path) -> Lora:
    """The `lora` section of the run: its config.yaml lies two folders up."""
    file = folder.absolute().parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} holds an adapter, but {file} with its rank and alpha is missing")
    section = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("lora") or {}
    section = {key: value for key, value in section.items() if key != "start_from"}
    cfg, problems = build(Lora, from_plain(section, f"{file}: lora", file.parent))
    if problems:
        raise Problems(problems)
    return cfg
