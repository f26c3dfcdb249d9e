"""Transforms of a built model, in the one order that composes: tensor parallel, compile, recompute, shard."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

from ftlib.parallel import gather8, recompute, tensor
from ftlib.parallel.run import Run
from ftlib.quant import FrozenWeight
from ftlib.quant.qat import RoundedLinear
from ftlib.sections import Memory


def apply(model: nn.Module, run: Run, memory: Memory, dtype: torch.dtype) -> None:
    """Split matrices over tp, compile and checkpoint each block, shard over fsdp: each where it has several processes.

    `model.model.layers` are the blocks. The model may still be on the meta device.
    """
    if run.dense["tp"].size() > 1:
        tensor.apply(model, run.dense["tp"])
    recompute.use(model, memory, run.device)
    if run.dense["fsdp"].size() > 1:  # copies that are not sharded: ftlib.parallel.replicas
        _shard(model, run, dtype)


def reshard(model: nn.Module) -> None:
    """Give up the whole copies of sharded weights that a forward without backward (an evaluation) left behind.

    While they are there, `named_parameters` gives them, in the dtype of the arithmetic, in place of what is trained.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        if any(not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            # torch 2.11 still waits for the head to be called, whose weight is read instead (nothing public ends that).
            state = module._get_fsdp_state()
            state._modules_to_run_forward.clear()
            state._fsdp_param_group._training_state = TrainingState.IDLE
            module.reshard()


def _gathered_in(block: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """What a block's weights become as they are gathered; None: they stay what they are, where an adapter's factors are
    not only multiplied with activations: rounded with their matrix (`qat`), or divided by its lengths (DoRA)."""
    whole = any(isinstance(m, RoundedLinear) or getattr(m, "magnitude", None) is not None for m in block.modules())
    trained = {p.dtype for p in block.parameters() if p.requires_grad}
    return None if whole and len(trained) == 1 else dtype  # FSDP2 wants one dtype of what trains in a unit


def _shard(model: nn.Module, run: Run, dtype: torch.dtype) -> None:
    """FSDP2: a unit per block; norm, head and a tied embedding together, kept whole after forward."""
    replicated = run.dense["dp_replicate"].size() > 1
    mesh = run.dense["dp_replicate", "fsdp"] if replicated else run.dense["fsdp"]
    reduce = torch.promote_types(dtype, torch.float32)
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            module.spread()
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce)}
    for block in model.model.layers:
        policy = MixedPrecisionPolicy(param_dtype=_gathered_in(block, dtype), reduce_dtype=reduce)
        gather8.use(fully_shard(block, mesh=mesh, mp_policy=policy))
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
