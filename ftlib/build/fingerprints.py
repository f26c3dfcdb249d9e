"""Config -> what a run is held to when it goes on."""

import dataclasses
import hashlib
from typing import Any

from ftlib import config, data
from ftlib.adapters import relora
from ftlib.adapters import setup as adapters
from ftlib.models import hub, own
from ftlib.sections import Mtp, Reward


def fingerprint(cfg: Any, rows: data.Datasets) -> dict[str, Any]:
    """What must be equal for a run to be continued: base model, data, order and size of a step. `config`, the whole of
    it, need not be: ftlib.checkpoint.changes has each key."""
    folder = hub.resolve(cfg.model.path)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:  # a header holds names, shapes and places of tensors; reading all takes minutes
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 16))
    found = {
        "config": config.redact_tree(config.to_dict(cfg)),
        "model": digest.hexdigest(),
        "data": rows.train.fingerprint,
        "data.seq_len": cfg.data.seq_len,
        "data.pack": getattr(cfg.data, "pack", True),
        "batch.rows": getattr(cfg.batch, "rows", None),
        "seed": cfg.seed,
        "dtype": cfg.dtype,
    }
    if code := own.mark(cfg.model.code):
        found["model.code"] = code.sha256
    if getattr(cfg, "qat", None) is not None:
        found["qat"] = dataclasses.asdict(cfg.qat)
    for key in ("quantize", "fp8"):
        if getattr(cfg.model, key):
            found[f"model.{key}"] = getattr(cfg.model, key)
    if getattr(getattr(cfg, "context", None), "skip", False):
        found["context.skip"] = True
    if getattr(cfg, "mtp", Mtp()).depth:
        found["mtp"] = dataclasses.asdict(cfg.mtp)
    if getattr(getattr(cfg, "optim", None), "states", None) is not None:
        found["optim.states"] = cfg.optim.states
    if cfg.tokenizer.add_tokens:
        found["tokenizer.add_tokens"] = list(cfg.tokenizer.add_tokens)
    if getattr(cfg, "lora", None) is not None:
        found |= adapters.fingerprint(cfg.lora) | relora.fingerprint(cfg)
    if hasattr(cfg, "dpo"):
        found["dpo"] = dataclasses.asdict(cfg.dpo)
    if isinstance(section := getattr(cfg, "reward", None), Reward):
        found["reward"] = dataclasses.asdict(section)
    if getattr(getattr(cfg, "lisa", None), "layers", 0):
        found["lisa"] = dataclasses.asdict(cfg.lisa)
    if hasattr(cfg, "train"):
        found |= {"train.only": cfg.train.only, "train.freeze": cfg.train.freeze}
    return found
