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

from ftlib.adapters import relora
from ftlib.config.types import no_folder
from ftlib.errors import UserError, about
from ftlib.kernels.linear_cross_entropy import tile_bytes
from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.remote import size
from ftlib.optim import lisa
from ftlib.sections import Optim, Parallel

PARKED = 4  # tensors on their way to host memory and back
WIDE = 3 * 4  # bytes of a number while it is merged: weight, change and sum in float32
STEPPED = 3  # parameters whose states are on the device at a time, where they wait in host memory


@dataclass(frozen=True)
class Need:
    """Bytes of one process, all ranks of a shard together holding one model."""

    weights: int
    gradients: int  # of all parameters that train; the largest of them where they move in backward
    optimizer: int  # what it keeps on the device
    host: int  # what it keeps in host memory instead
    activations: int
    checkpoint: int  # on disk, of the whole run
    final: int
    kept: int  # estimate: what backward needs of all blocks, as memory.recompute says; at least `activations`
    working: int  # estimate: the block that backward is in
    logits: int  # those that exist at a time, and the gradient of the hidden states
    head: int  # estimate: the head's own gradient, wide until the loss is known
    merged: int  # estimate: between two steps with `relora`, the largest matrix that an adapter is merged into
    gathered: int  # estimate: the weights of two blocks and the head, where other processes hold parts of them
    adds_up: bool  # gradients of several micro-batches: they are there from the second on

    @property
    def training(self) -> int:
        """Gradients and what the optimizer keeps."""
        return self.gradients + self.optimizer

    @property
    def memory(self) -> int:
        """The least."""
        return self.weights + self.training + self.activations

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """Estimate: what is there when the loss is computed, when backward begins and when it ends, and in a merge."""
        fixed = {"weights": self.weights, "optimizer": self.optimizer}
        early = self.gradients if self.adds_up else 0
        return {
            "loss": fixed | {"gradients": early + self.head, "activations": self.kept, "logits": self.logits,
                             "gathered": self.gathered},
            "backward": fixed | {"gradients": early + self.head // 3, "activations": self.kept + self.working,
                                 "gathered": self.gathered},
            "last block": fixed | {"gradients": self.gradients, "activations": self.working, "gathered": self.gathered},
            "merge": fixed | {"merged": self.merged},
        }  # fmt: skip

    @property
    def peak(self) -> str:
        """The moment that takes the most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def about(self) -> int:
        """The estimate."""
        return sum(self.moments[self.peak].values())


def need(model: nn.Module, cfg: Any, shards: int) -> Need:
    """The least a run takes, and about what. `model` is on meta, adapters attached; `shards` processes share its
    parameters, `cfg.parallel.cp` and `tp` of them the tokens of a row."""
    mesh, shared = getattr(cfg, "parallel", Parallel()), model.arch.tied
    parameters = [p for name, p in model.named_parameters() if not (shared and name == "lm_head.weight")]
    asleep, optim = {id(p) for p in lisa.asleep(model, 1)}, cfg.optim if hasattr(cfg, "optim") else Optim()
    active = [p for p in parameters if p.requires_grad and id(p) not in asleep]
    trained, final = sum(map(_bytes, active)), sum(_bytes(p) for p in parameters if p.requires_grad)
    into = relora.merged_into(model)
    below = sum(map(_bytes, into))  # once they changed, a checkpoint holds them
    each = [int(p.numel() * optim.state_bytes(p.element_size())) for p in active]
    states, at_a_time = sum(each), min(sum(each), STEPPED * max(each, default=0))
    parked = cfg.memory.offload or cfg.memory.budget_gib is not None  # which offloads where it has to
    codes = [b for b in model.buffers() if b.ndim > 1]  # of quantized matrices
    everything = sum(map(_bytes, [*parameters, *codes]))
    if parked and shards == 1 and not (shared or model.model.embed_tokens.weight.requires_grad):
        everything -= _bytes(model.model.embed_tokens.weight)
    largest = max(map(_bytes, active), default=0)
    rows = cfg.batch.micro_rows * max(1, mesh.dp_replicate) * max(1, shards // (mesh.cp * mesh.tp))
    return Need(
        weights=everything // shards + sum(_bytes(b) for b in model.buffers() if b.ndim < 2),
        gradients=(largest if optim.in_backward else trained) // shards,
        optimizer=(at_a_time if optim.offload else states) // shards,
        host=states // shards if optim.offload else 0,
        checkpoint=final + states + below,
        final=sum(map(_bytes, parameters)) if below else final,
        merged=WIDE * max((p.numel() for p in into), default=0) // shards,
        gathered=_gathered(model, cfg, shards // mesh.tp) // mesh.tp,
        adds_up=not optim.in_backward and getattr(cfg.batch, "rows", 2 * rows) > rows,
        **_activations(model, cfg, mesh, parked),
    )


def _activations(model: nn.Module, cfg: Any, mesh: Parallel, parked: bool) -> dict[str, int]:
    """What depends on the tokens of a forward."""
    arch, width = model.arch, 2 if cfg.dtype == "bf16" else 4
    tokens = cfg.batch.micro_rows * cfg.data.seq_len // mesh.cp
    tile = min(1.0, (cfg.memory.tiled_mlp or tokens) / tokens)
    scored = 0 if model.model.backend == "flex" else cfg.data.seq_len  # it keeps no score
    elements = [block_elements(arch, layer, scored, tile, mesh.tp) for layer in arch.layers]
    blocks = [tokens * width * count for count in elements]
    hidden = tokens * width * arch.dim
    attended = [tokens * width * layer.mixer.heads * layer.mixer.head_dim // mesh.tp for layer in arch.layers]
    lean = cfg.memory.lean(len(blocks))  # the others never wait in host memory

    def keeps(mode: str, part: slice) -> int:
        inputs = len(blocks[part]) * hidden // mesh.tp
        return {
            "full": inputs,
            "except_attention": inputs + sum(attended[part]),
            "selective": int(0.7 * sum(blocks[part])),
            "none": sum(blocks[part]),
        }[mode]

    first, rest = slice(lean), slice(lean, None)
    inputs = (min(lean, PARKED) if parked else lean) * hidden // mesh.tp + keeps("full", rest)
    kept = keeps(cfg.memory.recompute, first)
    if cfg.memory.offload:
        kept = min(kept, min(lean, PARKED) * hidden // mesh.tp)
    kept += keeps(cfg.memory.recompute_rest, rest)
    head = model.lm_head.weight
    return {
        "activations": inputs,
        "kept": max(kept, inputs) + 2 * hidden,  # the last hidden states and their gradient, for the head
        "working": max(blocks) * 4 // 3,  # the widest of them have gradients at the same time
        "logits": min(tile_bytes(head), tokens * width * head.shape[0]),
        "head": head.numel() * (4 + width) // mesh.tp if head.requires_grad else 0,
    }


def _gathered(model: nn.Module, cfg: Any, processes: int) -> int:
    """Estimate of what is whole for a while where `processes` share the weights: two blocks and the head's unit; of a
    block that trains its gradient too, and that again in float32 for the sum."""
    if processes == 1:
        return 0
    width = 2 if cfg.dtype == "bf16" else 4
    sizes = [
        sum(p.numel() * (2 * width + (width + 4) * (p.requires_grad and p.ndim > 1)) for p in block.parameters())
        + 2 * sum(_bytes(b) for b in block.buffers() if b.ndim > 1)
        for block in model.model.layers
    ]
    head = model.lm_head.weight
    return max(sizes) + head.numel() * (width + 4 * head.requires_grad)


def block_elements(arch: Arch, layer: Layer, seq_len: int, tile: float = 1.0, tp: int = 1) -> int:
    """Estimate of the numbers one block keeps for backward, for each token.

    Dense: both norms' inputs and outputs, queries, keys and values before and after they turn, what attention gives,
    and gate, up and their product. Experts keep these for each choice, and their own copies of input and output.
    Capped scores are kept three times, two of them in float32. `tile`: the share of the tokens that is in a dense
    feed-forward layer at a time. `tp` processes share all but the norms' outputs, which each has whole.
    """
    attention, ffn = layer.mixer, layer.ffn
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    inner = int(tile * 3 * ffn.hidden)
    if isinstance(ffn, Moe):
        inner = ffn.top_k * (3 * ffn.hidden + 2 * arch.dim) + (3 * ffn.shared.hidden if ffn.shared else 0)
    scores = 5 * attention.heads * seq_len if attention.softcap is not None else 0
    return 2 * arch.dim + (2 * arch.dim + 2 * (query + 2 * key) + query + inner + scores) // tp


def check(model: nn.Module, cfg: Any, shards: int) -> None:
    """UserError when this machine cannot hold the run that `cfg` asks for, in memory or on disk."""
    with about("output_dir"):
        check_folder(Path(cfg.output_dir))
    least = need(model, cfg, shards)
    narrower = "" if getattr(cfg, "dtype", "") == "bf16" else "dtype=bf16, "
    smaller = f"take a smaller model, LoRA in place of full training, {narrower}fewer batch.micro_rows, a shorter "
    fixes = (
        (_memory(least), "model, batch.micro_rows, data.seq_len", f"{smaller}data.seq_len or more processes"),
        (_disk(least, Path(cfg.output_dir)), "output_dir", "free some space, or put output_dir on another disk"),
    )
    problems = [problem for problem in fixes if problem[0]]
    if problems:
        raise UserError(
            "; ".join(text for text, _, _ in problems),
            where=", ".join(where for _, where, _ in problems),
            fix="; ".join(fix for _, _, fix in problems),
        )


def _existing(folder: Path) -> Path:
    """The part of a path that is there."""
    return next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())


def check_folder(folder: Path) -> None:
    """UserError where a run cannot write to its `output_dir`."""
    if why := no_folder(folder):  # of a config made in Python; `config.read` refuses others
        raise UserError(why, where="output_dir")
    there = _existing(folder)
    if not there.is_dir():
        raise UserError(f"{there} is a file, not a folder", where="output_dir", fix="name a folder of your own")
    if not os.access(there, os.W_OK | os.X_OK) or there.is_relative_to("/proc"):
        raise UserError(f"{there} cannot be written to", where="output_dir", fix="name a folder of your own")


def _memory(least: Need) -> str | None:
    where, have, sharing = available()
    if where == "the GPU" and (machine := _machine())[0] < least.host * machine[1]:
        what = f"the optimizer's state is {size(least.host)} of host memory"
        return f"{what} for each of {machine[1]} processes (optim.offload), this machine has {size(machine[0])}"
    waiting = least.host if where != "the GPU" else 0
    if (least.memory + waiting) * sharing <= have:
        return None
    parts = f"weights {size(least.weights)}, gradients and optimizer {size(least.training)}, "
    parts += f"kept activations {size(least.activations)}"
    parts += f", optimizer state in host memory {size(waiting)}" if waiting else ""
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    return f"at least {size(least.memory + waiting)} of memory are needed{each} ({parts}), {where} has {size(have)}"


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
    return "this machine", *_machine()


def _machine() -> tuple[int, int]:
    """(bytes of host memory, processes here that share it)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _bytes(p: nn.Parameter) -> int:
    return p.numel() * p.element_size()
