"""`memory.cuda_graph`: the blocks of a model as CUDA graphs, one for forward and one for backward.

The host spends some ten microseconds on a launch, whatever the kernel does, and a step of a small model has thousands
that the GPU waits for. A replay launches all of a pass at once: the same kernels on the same tensors, so the same bits.
Embedding, head, loss and optimizer stay as they are.

A graph holds addresses and what Python decided while it was recorded. Inputs are copied into tensors that stay where
they are, and gradients are added to those that the optimizer sees. Packed documents differ in number and length from
batch to batch, which `varlen` attention is told at its launch: bounds of both are rounded up, and each pair of them has
graphs of its own, over the same memory.

What a pass returns is written over by the next one, and autograd, which saw none of its operations, does not know when
a weight was changed between forward and backward.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
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
    found += ["profile"] if getattr(cfg, "profile", False) else []  # which cannot tell apart what a replay launches
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


def peak(model: nn.Module) -> int:
    """Bytes that tensors and graphs had on the GPU at most: to the allocator what graphs keep for their passes is free.

    Counts from when the allocator's peak was last forgotten, passes recorded until then included.
    """
    blocks = model.model.blocks
    seen = torch.cuda.max_memory_allocated()
    return max(blocks.record.highest, seen + blocks.record.unseen) if isinstance(blocks, Blocks) else seen


class _Recorder:
    """Record into CUDA graphs that share one pool of memory: none runs while another does."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.unseen = 0  # bytes of the pool that no tensor holds
        self.highest = 0  # bytes, until the last recording was done

    def warm(self, function: Callable[[], Any]) -> None:
        """Run it as it will be recorded: on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        self.highest = max(self.highest, torch.cuda.max_memory_allocated() + self.unseen)
        replays = [self._record(function) for function in functions]
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self.pool)]
        self.unseen = sum(s["total_size"] - s["allocated_size"] for s in segments)
        self.highest = max(self.highest, torch.cuda.memory_allocated() + self.unseen)
        torch.cuda.reset_peak_memory_stats()  # which counts what was recorded as tensors
        return replays

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others pin memory meanwhile
            function()
        return graph.replay


@dataclass(eq=False)
class _Places:
    """Where passes over one shape read and write, whatever documents lie there."""

    inputs: list[Tensor]  # embeddings, rotations, where documents lie
    hidden: Tensor
    grad: Tensor  # of `hidden`
    of_embeds: Tensor | None  # their gradient, if they have one
    trained: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # what a pass uses, and its gradient


@dataclass(eq=False)
class _Pass:
    """A forward and its backward, recorded."""

    places: _Places
    forward: Callable[[], None]
    backward: Callable[[], None]


@dataclass(eq=False)
class _Ticket:
    """A forward whose backward is still to come: its activations are where the next forward would put its own."""

    used: bool = False


@dataclass(eq=False)
class Blocks:
    """In place of `Decoder.blocks`: replays where it can, and else runs what it was made of."""

    decoder: nn.Module
    record: Any
    places: dict[tuple, _Places] = field(default_factory=dict)  # by shape
    passes: dict[tuple, _Pass] = field(default_factory=dict)  # by shape and bounds

    def __post_init__(self) -> None:
        self.plain = self.decoder.blocks
        parameters = (*self.decoder.layers.parameters(), *self.decoder.norm.parameters())
        self.trained = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor] = []  # their gradients
        self.last: Callable[[], _Ticket | None] = lambda: None
        # No parameter: one that a graph of autograd's holds belongs to the stream of that, and could not be recorded.
        self.anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor, tables: Tables, layout: Layout) -> Tensor:
        waiting = self.last()
        free = waiting is None or waiting.used
        if not (self.trained and torch.is_grad_enabled() and free and type(layout) is Layout):
            return self.plain(x, tables, layout)
        layout = replace(layout, extent=bounds(layout, self.decoder.backend))
        shape = _shape(x, tables, layout)
        key = (shape, None if layout.extent is None else tuple(layout.extent.tolist()))
        if key not in self.passes:
            if len(self.passes) == MOST:
                return self.plain(x, tables, layout)
            if shape not in self.places:
                self.places[shape] = self._placed(x, tables, layout)
            self.passes[key] = self._recorded(self.places[shape], tables, layout)
        return _Replay.apply(self, self.passes[key], self.anchor, x, *_tensors(tables, layout))

    def _placed(self, x: Tensor, tables: Tables, layout: Layout) -> _Places:
        """Copies of these inputs, over which passes have run: what is compiled, tuned or allocated once is there."""
        self.sums = self.sums or [torch.zeros_like(p) for p in self.trained]
        inputs = [t.detach().clone() for t in (x, *_tensors(tables, layout))]
        inputs[0].requires_grad_(x.requires_grad)
        hidden, grad, of_embeds = (torch.zeros_like(x) for _ in range(3))
        made = _Places(inputs, hidden, grad, of_embeds if x.requires_grad else None)
        found: list[Tensor | None] = []

        def both() -> None:
            found[:] = self._gradients(made, self._hidden(made, tables, layout))[1:]

        self.record.warm(both)
        made.trained = list(compress(zip(self.trained, self.sums, strict=True), [g is not None for g in found]))
        return made

    def _recorded(self, places: _Places, tables: Tables, layout: Layout) -> _Pass:
        """Both passes over these places."""
        kept: list[Tensor] = []

        def forward() -> None:
            kept.append(self._hidden(places, tables, layout))
            places.hidden.copy_(kept[0].detach())

        def backward() -> None:
            of_embeds, *grads = self._gradients(places, kept.pop())
            if places.of_embeds is not None:
                places.of_embeds.copy_(of_embeds)
            torch._foreach_add_([total for _, total in places.trained], [g for g in grads if g is not None])

        return _Pass(places, *self.record(forward, backward))

    def _hidden(self, places: _Places, tables: Tables, layout: Layout) -> Tensor:
        return self.plain(places.inputs[0], *_rebuilt(places.inputs[1:], tables, layout))

    def _gradients(self, places: _Places, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Of the embeddings and of each that is trained; None where it has none."""
        own = places.inputs[:1] if places.of_embeds is not None else []
        grads = torch.autograd.grad(hidden, [*own, *self.trained], places.grad, allow_unused=True)
        return grads if own else (None, *grads)


class _Replay(torch.autograd.Function):
    """`anchor` has a gradient, through which autograd knows that a backward belongs to this."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, recorded: _Pass, anchor: Tensor, *inputs: Tensor) -> Tensor:
        torch._foreach_copy_([t.detach() for t in recorded.places.inputs], list(inputs))
        recorded.forward()
        ctx.recorded, ctx.ticket, ctx.count = recorded, _Ticket(), len(inputs)
        blocks.last = weakref.ref(ctx.ticket)
        return recorded.places.hidden.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        places, ctx.ticket.used = ctx.recorded.places, True
        places.grad.copy_(grad)
        _gather(places.trained)
        ctx.recorded.backward()
        return None, None, None, places.of_embeds, *[None] * (ctx.count - 1)


def _gather(trained: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Have each parameter's gradient, with what is in it already, where a recorded backward adds its own."""
    fresh = [total for parameter, total in trained if parameter.grad is None]
    if fresh:
        torch._foreach_zero_(fresh)
    for parameter, total in trained:
        if parameter.grad is not None and parameter.grad is not total:
            total.copy_(parameter.grad)
        parameter.grad = total


def bounds(layout: Layout, backend: str) -> Tensor | None:
    """int32 [2], on the CPU: at least as many documents, and as long ones, as the batch has; of any batch where
    attention is not told them at its launch."""
    if layout.extent is None:
        return None
    most = layout.cu_seqlens.shape[0] - 1
    if backend != "varlen":
        return torch.tensor([most, layout.max_seqlen], dtype=torch.int32)
    documents, longest = layout.extent.tolist()
    rounded = LONGEST
    while rounded < longest:
        rounded *= 2
    return torch.tensor(
        [min(most, -(-documents // DOCUMENTS) * DOCUMENTS), min(layout.max_seqlen, rounded)], dtype=torch.int32
    )


def _shape(x: Tensor, tables: Tables, layout: Layout) -> tuple:
    shapes = (x.shape, x.dtype, x.requires_grad, layout.cu_seqlens.shape, layout.max_seqlen, layout.shape)
    return (*shapes, layout.extent is None, tuple(tables))


def _tensors(tables: Tables, layout: Layout) -> list[Tensor]:
    """What a pass reads beside the embeddings."""
    return [layout.cu_seqlens, *(t for turns in tables.values() for t in turns if t is not None)]


def _rebuilt(tensors: Sequence[Tensor], tables: Tables, layout: Layout) -> tuple[Tables, Layout]:
    """Tables and layout over other tensors, in the order of `_tensors`."""
    rest = iter(tensors[1:])
    made = {rope: Turns(*(None if t is None else next(rest) for t in turns)) for rope, turns in tables.items()}
    return made, replace(layout, cu_seqlens=tensors[0], masks=dict(layout.masks), _document_ids=None)
