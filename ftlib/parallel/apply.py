"""Transforms of a built model, in the one order that composes: compile, recompute, shard."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ftlib.parallel.run import Run
from ftlib.sections import Memory


def apply(model: nn.Module, run: Run, memory: Memory, dtype: torch.dtype) -> None:
    """Compile and checkpoint each block, then shard over the fsdp axis when there is more than one process.

    `model.model.layers` are the blocks. The model may still be on the meta device.
    """
    layers = model.model.layers
    if memory.compile is True or (memory.compile == "auto" and run.device.type == "cuda"):
        for block in layers:
            # Inside the recomputed region, so that recomputing runs the compiled code; parameter names do not change.
            block.compute = torch.compile(block.compute, fullgraph=True)
    for block in layers:
        block.recompute = memory.recompute == "full"
    if run.dense["dp_replicate"].size() * run.dense["fsdp"].size() > 1:
        _shard(model, run, dtype)


def _shard(model: nn.Module, run: Run, dtype: torch.dtype) -> None:
    """FSDP2: a unit per block; norm, head and a tied embedding together, kept whole after forward."""
    replicated = run.dense["dp_replicate"].size() > 1
    mesh = run.dense["dp_replicate", "fsdp"] if replicated else run.dense["fsdp"]
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for block in model.model.layers:
        fully_shard(block, **options)
    if model.arch.tied:
        fully_shard([model.model.embed_tokens, model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    else:
        fully_shard(model.model.embed_tokens, **options)
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is already divided by the step's tokens over all ranks
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
