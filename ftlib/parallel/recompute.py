"""How the blocks of a model trade speed for memory: what backward computes again, and in what pieces."""

import re
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ftlib.quant import QuantizedLinear
from ftlib.quant.qat import RoundedLinear
from ftlib.sections import Memory

ATTENTION = re.compile("attention|attn")  # in the names of operations
PRODUCTS = re.compile(r"attention|attn|mm|linear|lora_project|fp8_product|conv")
WHOLE = ("full", "except_attention")  # every product of a block is computed again in backward


def use(model: nn.Module, memory: Memory, device: torch.device) -> None:
    """Put a setting into the blocks, `model.model.layers`; again with another one is allowed between two steps.

    The model may still be on the meta device; `device` is where it will compute.
    """
    layers = [*model.model.layers, *(depth.block for depth in getattr(model, "mtp", None) or ())]
    for block in layers:
        if hasattr(getattr(block, "mlp", None), "tile"):
            block.mlp.tile = memory.tiled_mlp
        for module in block.modules():
            if isinstance(module, QuantizedLinear):
                module.recomputed = memory.recompute in WHOLE
    if memory.compile is True or (memory.compile == "auto" and device.type == "cuda"):
        _compile(layers, memory.recompute)
        return
    for i, block in enumerate(layers):
        block.recompute = memory.recompute in WHOLE or (memory.recompute == "selective" and i % 2 == 0)


def _compile(layers: list[nn.Module], recompute: str) -> None:
    """Compile each block; its compiler decides what backward recomputes, and leaves out what backward never reads.

    `full` keeps a block's input alone. `except_attention` keeps the output of attention too, the dearest to make again;
    where matrices train, the compiler would keep every product, so there each operation is told. `selective` makes
    elementwise results again (normalised inputs, the product inside the feed-forward layer), which costs little, and
    keeps the outputs of matrix products and attention: each operation is told, as a compiler takes products that are
    operators of ours for free.
    """
    # Each kind of block, with and without gradients, with each adapter: all are versions of one function.
    torch._dynamo.config.recompile_limit = 64
    partitioner = torch._functorch.config  # read when a block is compiled; no public switch exists
    kept = PRODUCTS if recompute == "selective" else None
    if recompute == "except_attention" and any(_trains(block) for block in layers):
        kept = ATTENTION
    partitioner.aggressive_recomputation = recompute == "except_attention" and kept is None
    partitioner.activation_memory_budget = 0.0 if recompute == "full" else 1.0
    keep = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, kept))
    rounds = any(isinstance(module, RoundedLinear) for block in layers for module in block.modules())
    exact = {"options": {"eager_numerics.division_rounding": True}} if rounds else {}  # codes as files have them
    for block in layers:
        block.__dict__.pop("compute", None)  # what an earlier setting compiled
        compute = block.compute if kept is None else partial(keep, block.compute)
        block.compute = torch.compile(compute, fullgraph=True, **exact)  # in place: parameter names do not change


def _trains(block: nn.Module) -> bool:
    """Whether a matrix of the model itself is trained, not only adapters."""
    return any(p.requires_grad and name.endswith(".weight") and p.ndim >= 2 for name, p in block.named_parameters())


def _contexts(kept: re.Pattern) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a checkpointed function keeps: the outputs of operations with such names."""

    def policy(context: object, operation: object, *args: object, **options: object) -> CheckpointPolicy:
        named = kept.search(str(operation)) is not None
        return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.MUST_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
