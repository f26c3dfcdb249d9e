"""Tensor parallelism with sequence parallelism: one plan for all families, by the names modules have in every one.

Parameters are sharded (DTensors on the `tp` axis, as state, optimizer and files see them); what a module computes with
is its local part, which its attributes give while the parameters themselves stay whole. Processes talk only at a
block's edges: between them hidden states are split along the sequence, the mixer and the feed-forward part each gather
their input (the gradient that comes back is a part of a sum) and scatter the sum of their outputs. Norms see their
slice of the sequence. The head stays split over the vocabulary into the loss (ftlib.kernels.linear_cross_entropy).

In a mixture of experts each process routes all tokens, alike, and has a slice of every expert's width: what it adds to
an output, and to the gradient of a routing weight, is a part of a sum as in a dense layer.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ftlib.adapters.experts import ExpertFactors
from ftlib.adapters.factors import LoraFactors
from ftlib.adapters.saved_modules import waits
from ftlib.errors import UserError
from ftlib.layers.linear import Linear
from ftlib.layers.moe import ExpertLinear, Moe
from ftlib.parallel.collectives import gather, scatter_sum, shared, summed

COLUMN, ROW, SAME, VOCAB, HEAD, WIDE = "column", "row", "same", "vocab", "head", "wide"
PLAN = {
    "embed_tokens": VOCAB,
    "lm_head": HEAD,
    "q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "gate_proj": COLUMN, "up_proj": COLUMN,
    "o_proj": ROW, "down_proj": ROW,
    "attn_pre": SAME, "attn_post": SAME, "mlp_pre": SAME, "mlp_post": SAME, "norm": SAME,
    "q_norm": SAME, "k_norm": SAME,  # one weight for all heads: each process norms its own heads
    "self_attn": COLUMN,  # what attention itself has for each head: sinks, factors of scalable softmax
    "gate": SAME, "router": SAME, "gate_up_proj": COLUMN,  # of experts, whose down_proj is a row as any other
    "shared_expert_gate": SAME,  # each process's part of the shared expert is multiplied with the whole gate
}  # fmt: skip
HEAD_NORMS = ("q_norm", "k_norm")  # over all heads in some families: then each process has its heads' weights
EDGES = ("self_attn", "mlp")  # their input and output is a hidden state


def apply(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model (meta or not, adapters attached) over the one-dimensional `tp` mesh. Frozen stays frozen."""
    group = mesh.get_group()
    for name, module in list(model.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if ".adapters." in name or isinstance(module, nn.Identity):
            continue
        if leaf in EDGES:
            module.register_forward_pre_hook(partial(_enter, group))
            module.register_forward_hook(partial(_leave, group))
        if _computes(module):
            over_all = leaf in HEAD_NORMS and module.weight.numel() != _head_dim(model, name)
            _place(module, WIDE if over_all else PLAN[leaf], mesh)
    model.model.norm.register_forward_hook(lambda module, args, y: gather(y, 1, group))
    model.tie()


def check(model: nn.Module, tp: int, cp: int = 1) -> None:
    """UserError when a model has parts that `tp` processes cannot share, naming the keys of its config.json."""
    wrong, unplanned, where = [], "", "parallel.tp, config.json"
    arch = model.arch
    sizes = {"vocab_size": {arch.vocab}}
    for layer in arch.layers:
        for field, key in (("heads", "num_attention_heads"), ("kv_heads", "num_key_value_heads")):
            sizes.setdefault(key, set()).add(getattr(layer.mixer, field, tp))
        width = "moe_intermediate_size" if isinstance(layer.ffn, Moe) else "intermediate_size"
        width = width if width in model.config else "intermediate_size"
        sizes.setdefault(width, set()).add(getattr(layer.ffn, "hidden", tp))
        if shared := getattr(layer.ffn, "shared", None):
            width = "shared_expert_intermediate_size" if shared.gated else width
            sizes.setdefault(width, set()).add(shared.hidden)
    for key, values in sizes.items():
        wrong += [f"{key} {value} is no multiple of parallel.tp {tp}" for value in sorted(values) if value % tp]
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if ".adapters" in name or not _computes(module) or isinstance(module, nn.Identity):
            continue
        if leaf not in PLAN:
            unplanned = f"{name} ({type(module).__name__}) has no tensor-parallel plan"
            wrong.append(unplanned)
            break
    if wrong:
        common = 1 if unplanned else math.gcd(*(value for values in sizes.values() for value in values))
        fits = max(ways for ways in range(1, tp) if common % ways == 0)
        why = f", the largest below {tp} that divides these sizes" if fits > 1 else ""
        raise UserError("; ".join(wrong), where=where, fix=f"set parallel.tp={fits}{why}")


def check_base(model: nn.Module, tp: int) -> None:
    """UserError when a quantized matrix would have to be cut inside a block of weights that share a scale."""
    for name, module in model.named_modules():
        base, role = getattr(module, "base", None), PLAN.get(name.rsplit(".", 1)[-1])
        if base is None or role is None:
            continue
        dim = _placements(module, role, role == COLUMN)["weight"].dim
        if base.shape[dim] % tp == 0 and not base.divides(dim, tp):  # the last dimension: `check` knows the sizes
            side = "outputs" if getattr(module, "transposed", False) else "inputs"
            what = f"{name} has {base.shape[dim]} {side}, kept in blocks of {base.block}, for {tp} processes"
            where, fix = "model.quantize, parallel.tp", "model.quantize=int8 or fp8, or a smaller parallel.tp"
            raise UserError(what, where=where, fix=fix)


def _computes(module: nn.Module) -> bool:
    """Whether it has something of its own to share: parameters, an adapter's, or a matrix in few bits."""
    return bool(module._parameters) or hasattr(module, "adapters") or hasattr(module, "base")


def _head_dim(model: nn.Module, name: str) -> int:
    return model.get_submodule(name.rsplit(".", 1)[0]).spec.head_dim


def _enter(group: ProcessGroup, module: nn.Module, args: tuple) -> tuple:
    return gather(args[0], 1, group), *args[1:]


def _leave(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return scatter_sum(y, 1, group)


def _place(module: nn.Module, role: str, mesh: DeviceMesh) -> None:
    """Shard a module's parameters, its adapters' with them, and let it compute with its own part."""
    split = role in (COLUMN, VOCAB, HEAD, WIDE)
    placements = _placements(module, role, split)
    _distribute(module, placements, mesh)
    names = tuple(module._parameters)
    if hasattr(module, "base"):  # in few bits: no parameter
        module.base.shard(placements["weight"].dim, mesh)
        names += ("weight",)
    for adapter in getattr(module, "adapters", {}).values():
        if not isinstance(adapter, LoraFactors):
            _distribute(adapter, placements, mesh)
            continue
        a, b = (Replicate(), Shard(0)) if split else (Shard(1), Replicate())
        apart = split and getattr(module, "parts", 1) > 1  # rows of B belong to gate and to up: no slice is one's own
        b = Replicate() if apart else b
        _distribute(adapter, {"lora_A": a, "lora_B": b, "magnitude": b, "start_A": a, "start_B": b}, mesh)
        adapter.__class__ = _local(type(adapter), tuple(_sharded(adapter)), (("lora_B", _own_rows),) if apart else ())
        adapter.tp_group = mesh.get_group()
        if not split:
            adapter.over_inputs = partial(summed, group=mesh.get_group())
    if role != HEAD:  # the loss needs to know that the head is a part
        module.__class__ = _local(type(module), names, (("bias", _once),) if role == ROW else ())
    module.tp_group = mesh.get_group()
    if role == WIDE:
        module.over_features = partial(_mean, mesh.get_group())
    elif role == VOCAB:
        module.forward = partial(_embed, module)
    elif role == HEAD:
        module.forward = partial(_logits, module)


def _placements(module: nn.Module, role: str, split: bool) -> dict[str, Placement]:
    """How a module's own parameters are placed; of stacked experts, the width of each."""
    rows, columns, ends = 0, 1, 0
    if isinstance(module, ExpertLinear):
        last = module.weight.ndim - 1
        rows, columns, ends = (last, 1, last - 1) if module.transposed else (last - 1, last, last - 1)
    weight = Shard(rows) if split else Shard(columns) if role == ROW else Replicate()
    return {"weight": weight} | dict.fromkeys(("bias", "sinks", "ssmax"), Shard(ends) if split else Replicate())


def _once(module: nn.Module, bias: Tensor) -> Tensor:
    """What is added to a part of a sum: only the first process has other than zeros."""
    return bias * (module.tp_group.rank() == 0)


def _own_rows(adapter: ExpertFactors, b: Tensor) -> Tensor:
    """This process's slice of the rows of each part."""
    group = adapter.tp_group
    return b.unflatten(0, (adapter.parts, group.size(), -1))[:, group.rank()].flatten(0, 1)


def _mean(group: ProcessGroup, x: Tensor) -> Tensor:
    """The mean of every process's `x`, which each goes on with on its own features."""
    return shared(summed(x, group), group) / group.size()


def _sharded(module: nn.Module) -> list[str]:
    """Names of a module's sharded parameters and buffers."""
    return [n for n, t in (*module._parameters.items(), *module._buffers.items()) if isinstance(t, DTensor)]


def _distribute(module: nn.Module, placements: dict[str, Placement], mesh: DeviceMesh) -> None:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None or name == "e_score_correction_bias":  # alike on every process, and no parameter
                continue
            # src_data_rank=None: every process has the same values, so nothing needs to be sent.
            part = distribute_tensor(tensor.detach(), mesh, [placements[name]], src_data_rank=None)
            tensors[name] = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


@cache
def _local(
    kind: type[nn.Module],
    names: tuple[str, ...],
    changed: tuple[tuple[str, Callable[[nn.Module, Tensor], Tensor]], ...],
) -> type[nn.Module]:
    """`kind` whose attributes `names` are the local parts of its sharded parameters, as plain tensors.

    A replicated one is used by each process on its own part of the sequence, heads or features, hence its gradients
    are summed. `changed`: (name, what the module makes of the local part).
    """
    changes = dict(changed)

    def view(name: str) -> property:
        inner: Callable | None = getattr(getattr(kind, name, None), "fget", None)

        def get(self: nn.Module) -> Tensor | None:
            tensor = inner(self) if inner else self._parameters.get(name, self._buffers.get(name))
            if not isinstance(tensor, DTensor) or waits(tensor):
                return tensor  # sharded over data ranks too: FSDP will gather it before anything computes
            local = tensor.to_local()
            if tensor.placements[0].is_replicate():
                local = shared(local, self.tp_group)
            return changes[name](self, local) if name in changes else local

        return property(get)

    return type(kind.__name__, (kind,), {name: view(name) for name in names})


def _embed(module: nn.Embedding, ids: Tensor) -> Tensor:
    """This process's slice of the sequence, from every process's slice of the vocabulary."""
    weight, group = module.weight, module.tp_group
    at = ids - group.rank() * weight.shape[0]
    elsewhere = (at < 0) | (at >= weight.shape[0])
    x = F.embedding(at.masked_fill(elsewhere, 0), weight)
    return scatter_sum(x.masked_fill(elsewhere[..., None], 0), 1, group)


def _logits(module: Linear, hidden: Tensor) -> Tensor:
    """Whole logits, for evaluation and generation: training never forms them."""
    with torch.no_grad():
        return gather(F.linear(hidden, module.weight.to_local()), hidden.ndim - 1, module.tp_group)
