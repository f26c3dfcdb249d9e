"""Parameters -> a folder in Hugging Face layout that transformers and we load."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ftlib.models import keys, mtp, own
from ftlib.models.language_model import LanguageModel
from ftlib.models.load import Stored, base_state
from ftlib.models.shards import whole
from ftlib.models.weights import save_tensors

SHARD_BYTES = 5 * 1024**3
Tensors = Iterator[tuple[str, Tensor]]
Packed = tuple[Callable[[Tensors], Tensors], dict]


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    write: bool = True,
    packed: Packed | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write config.json and safetensors shards of at most `shard_bytes`, plus the source's generation_config.json,
    what predicts further tokens (ftlib.models.mtp) and the record of a user's class (ftlib.models.own).

    Every process of a sharded model must call this; only the one with `write` touches the disk. Peak memory: one shard.
    `packed`: what the tensors become before they are written, and the `quantization_config` that says so. `about`: what
    else the record says of how they were trained.
    """
    folder = Path(folder)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    every = hf_tensors(model) if packed is None else packed[0](hf_tensors(model))
    for tensors in _shards(every, shard_bytes):
        if write:
            path = folder / f"part-{len(shards)}.safetensors"
            save_tensors(tensors, path)
            shards.append((path, list(tensors)))
            total += sum(t.numel() * t.element_size() for t in tensors.values())
    mtp.save(model, folder, write)
    if not write:
        return
    _name_shards(folder, shards, total)
    config = dict(model.config)
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    dtype = next(iter(base_state(model).values())).dtype
    config |= {"tie_word_embeddings": model.arch.tied, "dtype": str(dtype).removeprefix("torch.")}
    if packed is not None:
        config["quantization_config"] = packed[1]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own.record(folder, about or {}, getattr(model, "code", None))
    source = getattr(model, "source", None)
    if source is not None and (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def hf_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint key and whole tensor on the CPU, one at a time, tied head left out, kept tensors carried along."""
    state = base_state(model)
    if model.arch.tied:
        state.pop("lm_head.weight")
    for key, tensor in keys.hf_tensors(state, model.table, lambda name: _dense(state[name])):
        yield key, tensor.contiguous()
    for key, file in getattr(model, "kept", {}).items():
        with safe_open(file, framework="pt") as opened:
            yield key, opened.get_tensor(key)


def _dense(tensor: Tensor | Stored) -> Tensor:
    return whole(tensor if isinstance(tensor, Tensor) else tensor.dequantize())


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors:
        add = tensor.numel() * tensor.element_size()
        if shard and size + add > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += add
    if shard:
        yield shard


def _name_shards(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, held) in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
