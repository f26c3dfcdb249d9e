"""What a run needs at the very least, against what the machine has: told before anything is loaded.

Only what is certain is counted (weights, gradients, AdamW's state, the hidden states that recomputation keeps), so that
nothing that could work is refused. What a run really takes is in `peak_memory_gib` of its metrics.jsonl.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftlib.errors import UserError
from ftlib.models.remote import size


@dataclass(frozen=True)
class Need:
    """Bytes of one process, all ranks of a shard together holding one model."""

    weights: int
    training: int  # gradients and the optimizer's two moments
    activations: int
    checkpoint: int  # on disk, of the whole run
    final: int

    @property
    def memory(self) -> int:
        return self.weights + self.training + self.activations


def need(model: nn.Module, cfg: Any, shards: int) -> Need:
    """The least a run takes. `model` is on meta, adapters attached; `shards` processes share its parameters."""
    parameters = [
        p for name, p in model.named_parameters() if not (model.arch.tied and name == "lm_head.weight")
    ]  # fmt: skip
    trained = sum(_bytes(p) for p in parameters if p.requires_grad)
    everything = sum(_bytes(p) for p in parameters)
    tokens = cfg.batch.micro_rows * cfg.data.seq_len
    hidden = len(model.arch.layers) * model.arch.dim * (2 if cfg.dtype == "bf16" else 4)
    return Need(
        weights=everything // shards,
        training=3 * trained // shards,
        activations=tokens * hidden,
        checkpoint=3 * trained,
        final=trained,
    )


def check(model: nn.Module, cfg: Any, shards: int) -> None:
    """UserError when this machine cannot hold the run that `cfg` asks for, in memory or on disk."""
    least = need(model, cfg, shards)
    problems = [text for text in (_memory(least), _disk(least, Path(cfg.output_dir))) if text]
    if problems:
        raise UserError(
            "; ".join(problems),
            where="model, batch.micro_rows, data.seq_len, output_dir",
            fix="take a smaller model, LoRA in place of full training, dtype=bf16, fewer batch.micro_rows, a shorter "
            "data.seq_len or more processes; output_dir may be on another disk",
        )


def _memory(least: Need) -> str | None:
    where, have, sharing = available()
    if least.memory * sharing <= have:
        return None
    parts = f"weights {size(least.weights)}, gradients and optimizer {size(least.training)}, "
    parts += f"kept activations {size(least.activations)}"
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    return f"at least {size(least.memory)} of memory are needed{each} ({parts}), {where} has {size(have)}"


def _disk(least: Need, folder: Path) -> str | None:
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    wanted = least.checkpoint + least.final
    if wanted <= free:
        return None
    return f"one checkpoint and the result are {size(wanted)}, {there} has {size(free)} free"


def available() -> tuple[str, int, int]:
    """(what it is, its bytes, processes that share it): the smallest GPU, or the memory of this machine."""
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return "the GPU", min(sizes), 1
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return "this machine", total, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _bytes(p: nn.Parameter) -> int:
    return p.numel() * p.element_size()
