"""A run's checkpoint -> a model, on the CPU and without the processes that wrote it. Imports torch."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ftlib import quant, sections, tokenizers
from ftlib.adapters import lora, token_rows
from ftlib.checkpoint.verify import verify
from ftlib.config.build import build
from ftlib.config.tree import from_plain
from ftlib.errors import Problems, UserError
from ftlib.losses.diffusion import MASK
from ftlib.models import LanguageModel, hub, load, own
from ftlib.models.resize import NAMES, resize_embeddings
from ftlib.sections import Lora
from ftlib.tokenizers import Tokenizer

PREFIX = "model."
LOW_PRECISION = ("quantize", "fp8")  # keys of the model's section
BESIDE = "mtp."  # modules beside the decoder, without which the model is whole (ftlib.models.mtp)


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
    saved = _saved(folder)
    names = {name: name.removeprefix(PREFIX) for name in saved if name.startswith(PREFIX)}
    names = {name: ours for name, ours in names.items() if not ours.startswith(BESIDE)}
    has_adapter = any(".adapters." in name for name in names)
    if has_adapter:
        section, tokens = _section(folder, "lora", Lora), added(folder, tokenizer(folder, model.source))
        resize_embeddings(model, max((i + 1 for i in tokens), default=0))
        lora.attach_section(model, section, tokens=token_rows.everywhere(model, tokens))
    elif (embedding := saved.get(f"{PREFIX}{NAMES[0]}")) is not None:
        resize_embeddings(model, embedding.size[0])
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


def predicts_ahead(folder: Path) -> bool:
    """Whether a folder is a checkpoint with modules that predict further tokens, which `fill` leaves out."""
    return is_checkpoint(folder) and any(name.startswith(PREFIX + BESIDE) for name in _saved(folder))


def _saved(folder: Path) -> dict[str, Any]:
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def tokenizer(folder: Path, base: Path) -> Tokenizer:
    """The tokenizer of the run that wrote a checkpoint on `base`, with the tokens that it added."""
    section = _section(folder, "tokenizer", sections.Tokenizer, needed=False)
    found = tokenizers.from_pretrained(hub.resolve(section.path) if section.path else base)
    found.add_tokens(section.add_tokens)
    if section.pad_token is not None:
        found.set_pad(section.pad_token)
    return found


def base_form(folder: Path, base: Path, decoder: type[nn.Module] | None = None) -> str | None:
    """`quant.kept_in` of what the run that wrote an adapter's checkpoint made of `base`."""
    said = _said(_config(folder), "model")
    named = {key: said[key] for key in (*LOW_PRECISION, "fp8_smallest") if key in said}
    model = load.build(base, torch.bfloat16, decoder)  # shapes alone
    quant.attach(model, SimpleNamespace(model=sections.Model(path=str(base), **named), lora=True))
    return quant.kept_in(model)


def is_of_plain_base(adapter: Path) -> bool:
    """Whether an adapter is the `final/` of a run whose config, beside it, names no low precision of the base."""
    adapter = adapter.absolute()
    model = _said(adapter.parent / "config.yaml", "model") if adapter.name == "final" else {}
    return "path" in model and not any(map(model.get, LOW_PRECISION))


def rounded_in_fp32(folder: Path) -> bool:
    """Whether a checkpoint, or the `final/` of a run, was trained against rounding (`qat`) in float32."""
    folder = folder.absolute()
    whole = _read(_config(folder) if is_checkpoint(folder) else folder.parent / "config.yaml")
    return bool(whole.get("qat")) and whole.get("dtype") == "fp32" and (folder.name == "final" or is_checkpoint(folder))


def code(folder: Path) -> own.Mark | None:
    """The record of the `model.code` of the run that wrote a checkpoint."""
    named = _said(_config(folder), "model").get("code")
    sha256 = json.loads((folder / "state.json").read_text(encoding="utf-8"))["fingerprint"].get("model.code")
    return own.Mark(Path(named).name, sha256) if sha256 and named else None


def about(folder: Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint would record beside its result, `model.code` aside."""
    return {MASK: _said(_config(folder), "diffusion").get("mask_token")}


def added(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that the run was to learn."""
    section = _section(folder, "tokenizer", sections.Tokenizer, needed=False)
    return [tokenizer.special_tokens[token] for token in dict.fromkeys(section.add_tokens)]


def _section(folder: Path, name: str, kind: type[Any], needed: bool = True) -> Any:
    """A section of the config of the run that wrote a checkpoint."""
    file = _config(folder)
    if needed and not file.is_file():
        raise UserError(f"{folder} holds an adapter, but {file} with its rank and alpha is missing")
    section = {key: value for key, value in _said(file, name).items() if key != "start_from"}
    cfg, problems = build(kind, from_plain(section, f"{file}: {name}", file.parent))
    if problems:
        raise Problems(problems)
    return cfg


def _config(folder: Path) -> Path:
    """Where the config of the run that wrote a checkpoint lies."""
    return folder.absolute().parent.parent / "config.yaml"


def _said(config: Path, section: str) -> dict[str, Any]:
    """A section of a run's config; empty where it has none, and where there is no config."""
    found = _read(config).get(section)
    return found if isinstance(found, dict) else {}


def _read(config: Path) -> dict[str, Any]:
    """A run's config; empty where there is none."""
    whole = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    return whole if isinstance(whole, dict) else {}
