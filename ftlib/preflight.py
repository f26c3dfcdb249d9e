"""What a run needs: at the very least, against what the machine has, and about, for the user to plan with.

A run is refused for what is certain alone (weights, gradients, the optimizer's state, the hidden states that
recomputation keeps), so that nothing that could work is. `Need.about` adds an estimate of what blocks keep and compute
with. What a run really takes is in `peak_memory_gib` of its metrics.jsonl.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftlib.errors import UserError
from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.remote import size
from ftlib.optim import lisa
from ftlib.sections import Optim

PARKED = 4  # tensors on their way to host memory and back


@dataclass(frozen=True)
class Need:
    """Bytes of one process, all ranks of a shard together holding one model."""

    weights: int
    training: int  # gradients, if they are all there at once, and what the optimizer keeps
    activations: int
    checkpoint: int  # on disk, of the whole run
    final: int
    kept: int  # estimate: what backward needs of all blocks, as memory.recompute says; at least `activations`
    working: int  # estimate: the block that backward is in
    gathered: int  # estimate: the weights of two blocks, where other processes hold parts of them

    @property
    def memory(self) -> int:
        """The least."""
        return self.weights + self.training + self.activations

    @property
    def about(self) -> int:
        """The estimate."""
        return self.weights + self.training + self.kept + self.working + self.gathered


def need(model: nn.Module, cfg: Any, shards: int) -> Need:
    """The least a run takes. `model` is on meta, adapters attached; `shards` processes share its parameters."""
    parameters = [
        p for name, p in model.named_parameters() if not (model.arch.tied and name == "lm_head.weight")
    ]  # fmt: skip
    asleep, optim = {id(p) for p in lisa.asleep(model, 1)}, cfg.optim if hasattr(cfg, "optim") else Optim()
    final = sum(_bytes(p) for p in parameters if p.requires_grad)
    active = [p for p in parameters if p.requires_grad and id(p) not in asleep]
    trained = sum(_bytes(p) for p in active)
    states = int(sum(p.numel() * optim.state_bytes(p.element_size()) for p in active))
    everything = sum(_bytes(p) for p in parameters)
    quantized = sum(_bytes(b) for b in model.buffers())  # whole in each process
    width, tokens = 2 if cfg.dtype == "bf16" else 4, cfg.batch.micro_rows * cfg.data.seq_len
    tile = min(1.0, (cfg.memory.tiled_mlp or tokens) / tokens)
    each = (block_elements(model.arch, layer, cfg.data.seq_len, tile) for layer in model.arch.layers)
    blocks = [tokens * width * elements for elements in each]
    hidden = tokens * width * model.arch.dim
    parked = cfg.memory.offload or cfg.memory.budget_gib is not None  # which offloads where it has to
    inputs = (min(len(blocks), PARKED) if parked else len(blocks)) * hidden
    attended = tokens * width * sum(layer.mixer.heads * layer.mixer.head_dim for layer in model.arch.layers)
    kept = {
        "full": inputs,
        "except_attention": inputs + attended,
        "selective": int(0.7 * sum(blocks)),
        "none": sum(blocks),
    }[cfg.memory.recompute]
    if cfg.memory.offload:
        kept = min(kept, inputs)
    gathered = max(sum(_bytes(p) for p in block.parameters()) for block in model.model.layers) if shards > 1 else 0
    return Need(
        weights=everything // shards + quantized,
        training=(states + (0 if optim.in_backward else trained)) // shards,
        activations=inputs,
        checkpoint=final + states,
        final=final,
        kept=max(kept, inputs) + 2 * hidden,  # the last hidden states and their gradient, for the head
        working=2 * max(blocks),  # as many gradients as activations
        gathered=2 * gathered,
    )


def block_elements(arch: Arch, layer: Layer, seq_len: int, tile: float = 1.0) -> int:
    """Estimate of the numbers one block keeps for backward, for each token.

    Dense: both norms' inputs and outputs, queries, keys and values before and after they turn, what attention gives,
    and gate, up and their product. Experts keep these for each choice, and their own copies of input and output.
    Capped scores are kept three times, two of them in float32. `tile`: the share of the tokens that is in a dense
    feed-forward layer at a time.
    """
    attention, ffn = layer.mixer, layer.ffn
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    inner = int(tile * 3 * ffn.hidden)
    if isinstance(ffn, Moe):
        inner = ffn.top_k * (3 * ffn.hidden + 2 * arch.dim)
    scores = 5 * attention.heads * seq_len if attention.softcap is not None else 0
    return 4 * arch.dim + 2 * (query + 2 * key) + query + inner + scores


def check(model: nn.Module, cfg: Any, shards: int) -> None:
    """UserError when this machine cannot hold the run that `cfg` asks for, in memory or on disk."""
    _writable(Path(cfg.output_dir))
    least = need(model, cfg, shards)
    problems = [text for text in (_memory(least), _disk(least, Path(cfg.output_dir))) if text]
    if problems:
        raise UserError(
            "; ".join(problems),
            where="model, batch.micro_rows, data.seq_len, output_dir",
            fix="take a smaller model, LoRA in place of full training, dtype=bf16, fewer batch.micro_rows, a shorter "
            "data.seq_len or more processes; output_dir may be on another disk",
        )


def _existing(folder: Path) -> Path:
    """The part of a path that is there."""
    return next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())


def _writable(folder: Path) -> None:
    there = _existing(folder)
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder", where="output_dir", fix="name a folder of your own")
    if not os.access(there, os.W_OK | os.X_OK) or there.is_relative_to("/proc"):
        raise UserError(f"{there} cannot be written to", where="output_dir", fix="name a folder of your own")


def _memory(least: Need) -> str | None:
    where, have, sharing = available()
    if least.memory * sharing <= have:
        return None
    parts = f"weights {size(least.weights)}, gradients and optimizer {size(least.training)}, "
    parts += f"kept activations {size(least.activations)}"
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    return f"at least {size(least.memory)} of memory are needed{each} ({parts}), {where} has {size(have)}"


def _disk(least: Need, folder: Path) -> str | None:
    there = _existing(folder)
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
