"""How the blocks of a model trade speed for memory: what backward computes again, and in what pieces."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ftlib.errors import UserError
from ftlib.quant import QuantizedLinear
from ftlib.quant.qat import RoundedLinear
from ftlib.sections import Memory

ATTENTION = re.compile("attention|attn")  # in the names of operations
PRODUCTS = re.compile(r"attention|attn|mm|linear|lora_project|fp8_product|conv")
WHOLE = ("full", "except_attention")  # every product of a block is computed again in backward
BACKEND = "inductor"
EXACT = {"eager_numerics.division_rounding": True}  # where matrices are rounded: codes as files have them


def check(memory: Memory, count: int) -> None:
    """UserError where `memory` names more blocks than a model's `count`."""
    if memory.recompute_layers > count:
        fix = f"name fewer, or leave it out for all {count}"
        raise UserError(f"the model has {count} blocks", where="memory.recompute_layers", fix=fix)


def use(model: nn.Module, memory: Memory, device: torch.device) -> None:
    """Put a setting into the blocks, `model.model.layers`; again with another one is allowed between two steps.

    The model may still be on the meta device; `device` is where it will compute.
    """
    layers = [*model.model.layers, *(depth.block for depth in getattr(model, "mtp", None) or ())]
    modes = memory.of_blocks(len(layers))
    for block, mode in zip(layers, modes, strict=True):
        if hasattr(getattr(block, "mlp", None), "tile"):
            block.mlp.tile = memory.tiled_mlp
        for module in block.modules():
            if isinstance(module, QuantizedLinear):
                module.recomputed = mode in WHOLE
    if memory.compile is True or (memory.compile == "auto" and device.type == "cuda"):
        _compile(layers, modes)
        return
    for i, (block, mode) in enumerate(zip(layers, modes, strict=True)):
        block.recompute = mode in WHOLE or (mode == "selective" and i % 2 == 0)


class Cut(NamedTuple):
    """Where a block is cut into what forward keeps and what backward computes."""

    kept: re.Pattern | None  # operations whose outputs stay, told one by one; None: the compiler decides
    budget: float  # of all it could keep, what the compiler may
    aggressive: bool  # whether it repeats products for it


def _cut(mode: str, trains: bool) -> Cut:
    """`full` keeps a block's input alone. `except_attention` keeps the output of attention too, the dearest to make
    again; where matrices train, the compiler would keep every product, so there each operation is told. `selective`
    makes elementwise results again (normalised inputs, the product inside the feed-forward layer), which costs little,
    and keeps the outputs of matrix products and attention: each operation is told, as a compiler takes products that
    are operators of ours for free."""
    kept = PRODUCTS if mode == "selective" else ATTENTION if mode == "except_attention" and trains else None
    return Cut(kept, 0.0 if mode == "full" else 1.0, mode == "except_attention" and kept is None)


def _compile(layers: Sequence[nn.Module], modes: Sequence[str]) -> None:
    """Compile each block; its compiler decides what backward recomputes, and leaves out what backward never reads."""
    # Each kind of block, with and without gradients, with each adapter: all are versions of one function.
    torch._dynamo.config.recompile_limit = 64
    trains = any(_trains(block) for block in layers)
    rounds = any(isinstance(module, RoundedLinear) for block in layers for module in block.modules())
    options: dict[str, Any] = {"options": EXACT} if rounds else {}
    if len(set(modes)) == 1:
        partitioner = torch._functorch.config  # read when a block is compiled; no public switch exists
        _, partitioner.activation_memory_budget, partitioner.aggressive_recomputation = _cut(modes[0], trains)
    for block, mode in zip(layers, modes, strict=True):
        cut = _cut(mode, trains)
        if len(set(modes)) > 1:
            options = {"backend": _partitioned(cut.budget, cut.aggressive, rounds)}
        keep = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, cut.kept))
        block.__dict__.pop("compute", None)  # what an earlier setting compiled
        compute = block.compute if cut.kept is None else partial(keep, block.compute)
        block.compute = torch.compile(compute, fullgraph=True, **options)  # in place: parameter names do not change


@cache  # compiled code belongs to its backend: blocks that are cut alike share it
def _partitioned(budget: float, aggressive: bool, rounds: bool) -> Callable:
    """A backend that compiles with settings of its own, where blocks differ in them."""
    inner = torch._dynamo.lookup_backend(BACKEND)
    options = {"config_patches": EXACT} if rounds else {}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        cut = {"activation_memory_budget": budget, "aggressive_recomputation": aggressive}
        with torch._functorch.config.patch(cut):
            return inner(graph, inputs, **options)

    return backend


def _trains(block: nn.Module) -> bool:
    """Whether a matrix of the model itself is trained, not only adapters."""
    return any(p.requires_grad and name.endswith(".weight") and p.ndim >= 2 for name, p in block.named_parameters())


def _contexts(kept: re.Pattern) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a checkpointed function keeps: the outputs of operations with such names."""

    def policy(context: object, operation: object, *args: object, **options: object) -> CheckpointPolicy:
        named = kept.search(str(operation)) is not None
        return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.MUST_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
