"""`memory.cuda_graph`: the blocks of a model as CUDA graphs, one for forward and one for backward.

The host spends some ten microseconds on a launch, whatever the kernel does, and a step of a small model has thousands
that the GPU waits for. A replay launches all of a pass at once: the same kernels on the same tensors, so the same bits.
Embedding, head, loss and optimizer stay as they are.

A graph holds addresses and what Python decided while it was recorded. Inputs are copied into tensors that stay where
they are. Packed documents differ in number and length from batch to batch, which an attention kernel is told at its
launch: bounds of both are rounded up, and each pair of them has graphs of its own, over the same memory.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ftlib.errors import Problems, UserError
from ftlib.layers.attention import PACKED
from ftlib.layers.batch import Layout
from ftlib.layers.moe import Moe
from ftlib.layers.rope import Rope, Turns

MOST = 16  # pairs of graphs; a batch that would need another one runs without
WARM = 2  # passes before the first is recorded: what is compiled, tuned or allocated once
DOCUMENTS, LONGEST = 32, 128  # bounds are multiples of the one, and the other times a power of two

Tables = dict[Rope, Turns]
FIX = "set memory.cuda_graph=false"


def check(cfg: Any, world: int) -> None:
    """UserError where a pass is not the same kernels each time, or other processes take part in it."""
    if not cfg.memory.cuda_graph:
        return
    wanted = {"lora": "dropout", "relora": "every", "lisa": "layers", "optim": "in_backward", "memory": "offload"}
    found = [f"{section}.{key}" for section, key in wanted.items() if getattr(getattr(cfg, section, None), key, None)]
    found += ["qat"] if getattr(cfg, "qat", None) is not None else []
    found += ["model.code"] if cfg.model.code else []  # which may read what is no input of its blocks
    found += ["memory.budget_gib"] if cfg.memory.budget_gib is not None else []  # which may come to offload
    found += ["deterministic"] if getattr(cfg, "deterministic", False) == "elastic" else []  # sums by hooks
    problems = (
        (not torch.cuda.is_available(), "there is no GPU here to record on", "memory.cuda_graph"),
        (world > 1, "passes of one process are recorded, and this run has several", "memory.cuda_graph"),
        (not hasattr(cfg, "loss"), "only passes of next-token training are recorded", "memory.cuda_graph"),
        (bool(found), "what changes from pass to pass is not recorded", ", ".join(["memory.cuda_graph", *found])),
    )
    told = [str(UserError(what, where=where, fix=FIX)) for wrong, what, where in problems if wrong]
    if told:
        raise Problems(told)


def attach(model: nn.Module) -> None:
    """Replay the blocks of a model with weights in every pass that backward follows."""
    decoder = model.model
    if decoder.backend not in PACKED or any(isinstance(layer.ffn, Moe) for layer in model.arch.layers):
        what = "experts, and attention by masks, launch what a batch's values say"
        raise UserError(what, where="memory.cuda_graph, model.attention", fix=FIX)
    decoder.blocks = Blocks(decoder, _Recorder())


def unseen(model: nn.Module) -> int:
    """Bytes that graphs keep for their passes; to the allocator they are free."""
    return getattr(model.model.blocks, "unseen", 0)


class _Recorder:
    """Record into CUDA graphs that share one pool of memory: none runs while another does."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others pin memory meanwhile
            found = function()
        return graph.replay, found

    def warm(self, function: Callable[[], Any]) -> None:
        """Run it as it will be recorded: on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def unseen(self) -> int:
        """Bytes of the pool that no tensor holds."""
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self.pool)]
        return sum(s["total_size"] - s["allocated_size"] for s in segments)


@dataclass(eq=False)
class _Pass:
    """A forward and its backward, recorded, and the tensors that they read and write."""

    inputs: list[Tensor]  # embeddings, rotations, where documents lie
    forward: Callable[[], None]
    hidden: Tensor
    grad: Tensor  # of `hidden`
    backward: Callable[[], None]
    grads: Sequence[Tensor]  # of the embeddings, if they have one, and of what is trained


@dataclass(eq=False)
class _Ticket:
    """A forward whose backward is still to come: its activations are where the next forward would put its own."""

    used: bool = False


@dataclass(eq=False)
class Blocks:
    """In place of `Decoder.blocks`: replays where it can, and else runs what it was made of."""

    decoder: nn.Module
    record: Any
    unseen: int = 0
    passes: dict[tuple, _Pass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plain = self.decoder.blocks
        parameters = (*self.decoder.layers.parameters(), *self.decoder.norm.parameters())
        self.trained = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor] = []  # the gradients that an optimizer sees, which no replay writes over
        self.last: Callable[[], _Ticket | None] = lambda: None
        # No parameter: one that a graph of autograd's holds belongs to the stream of that, and could not be recorded.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor, tables: Tables, layout: Layout) -> Tensor:
        waiting = self.last()
        free = waiting is None or waiting.used
        if not (self.trained and torch.is_grad_enabled() and free and type(layout) is Layout):
            return self.plain(x, tables, layout)
        layout = replace(layout, extent=bounds(layout))
        key = _key(x, tables, layout)
        if key not in self.passes:
            if len(self.passes) == MOST:
                return self.plain(x, tables, layout)
            self.passes[key] = self._recorded(x, tables, layout)
            self.unseen = self.record.unseen()
        return _Replay.apply(self, self.passes[key], self.anchor, x, *_tensors(tables, layout))

    def _recorded(self, x: Tensor, tables: Tables, layout: Layout) -> _Pass:
        """Both passes over copies of these inputs."""
        if not self.sums:
            self.sums = [torch.zeros_like(p) for p in self.trained]
        inputs = [t.detach().clone() for t in (x, *_tensors(tables, layout))]
        inputs[0].requires_grad_(x.requires_grad)
        args = (inputs[0], *_rebuilt(inputs[1:], tables, layout))
        leaves = [*inputs[:1] * x.requires_grad, *self.trained]
        made: dict[str, Tensor] = {}

        def forward() -> Tensor:
            made["hidden"] = self.plain(*args)
            return made["hidden"].detach()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(made.pop("hidden"), leaves, grad)

        grad = torch.zeros_like(x)
        self.record.warm(lambda: (forward(), backward()))
        replay, hidden = self.record(forward)
        replay_backward, grads = self.record(backward)
        return _Pass(inputs, replay, hidden, grad, replay_backward, grads)

    def collect(self, grads: Sequence[Tensor]) -> None:
        """Add the gradients of what is trained to those that are there already."""
        fresh = [(s, g) for p, s, g in zip(self.trained, self.sums, grads, strict=True) if p.grad is None]
        more = [(p.grad, g) for p, g in zip(self.trained, grads, strict=True) if p.grad is not None]
        for put, pairs in ((torch._foreach_copy_, fresh), (torch._foreach_add_, more)):
            if pairs:
                put(*map(list, zip(*pairs, strict=True)))
        for parameter, total in zip(self.trained, self.sums, strict=True):
            if parameter.grad is None:
                parameter.grad = total


class _Replay(torch.autograd.Function):
    """`anchor` has a gradient, through which autograd knows that a backward belongs to this."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, recorded: _Pass, anchor: Tensor, *inputs: Tensor) -> Tensor:
        torch._foreach_copy_([t.detach() for t in recorded.inputs], list(inputs))
        recorded.forward()
        ctx.blocks, ctx.recorded, ctx.ticket, ctx.count = blocks, recorded, _Ticket(), len(inputs)
        blocks.last = weakref.ref(ctx.ticket)
        return recorded.hidden.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recorded, ctx.ticket.used = ctx.recorded, True
        recorded.grad.copy_(grad)
        recorded.backward()
        own = len(recorded.grads) - len(ctx.blocks.trained)  # 1 where embeddings have a gradient
        ctx.blocks.collect(recorded.grads[own:])
        of_embeds = recorded.grads[0] if own else None
        return None, None, None, of_embeds, *[None] * (ctx.count - 1)


def bounds(layout: Layout) -> Tensor | None:
    """int32 [2], on the CPU: at least as many documents, and as long ones, as the batch has."""
    if layout.extent is None:
        return None
    documents, longest = layout.extent.tolist()
    rounded = LONGEST
    while rounded < longest:
        rounded *= 2
    most = layout.cu_seqlens.shape[0] - 1
    return torch.tensor(
        [min(most, -(-documents // DOCUMENTS) * DOCUMENTS), min(layout.max_seqlen, rounded)], dtype=torch.int32
    )


def _key(x: Tensor, tables: Tables, layout: Layout) -> tuple:
    extent = None if layout.extent is None else tuple(layout.extent.tolist())
    shapes = (x.shape, x.dtype, x.requires_grad, layout.cu_seqlens.shape, layout.max_seqlen, layout.shape)
    return (*shapes, tuple(tables), extent)


def _tensors(tables: Tables, layout: Layout) -> list[Tensor]:
    """What a pass reads beside the embeddings."""
    return [layout.cu_seqlens, *(t for turns in tables.values() for t in turns if t is not None)]


def _rebuilt(tensors: Sequence[Tensor], tables: Tables, layout: Layout) -> tuple[Tables, Layout]:
    """Tables and layout over other tensors, in the order of `_tensors`."""
    rest = iter(tensors[1:])
    made = {rope: Turns(*(None if t is None else next(rest) for t in turns)) for rope, turns in tables.items()}
    return made, replace(layout, cu_seqlens=tensors[0], masks=dict(layout.masks), _document_ids=None)
