"""Chunks of decode steps: one after the other, or on a GPU as replays of a CUDA graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftlib.generation.pages import Pool
from ftlib.generation.requests import Request
from ftlib.generation.rows import Rows
from ftlib.layers.batch import Batch
from ftlib.layers.moe import Moe
from ftlib.layers.rope import Turns
from ftlib.models import LanguageModel
from ftlib.models.decoder import Block, Decoder

Drawn = tuple[list[list[int]], list[list[float]]]  # tokens and log-probabilities, [requests][steps]
BUCKETS = (1, 2, 4, 8, 16)  # numbers of rows that get a graph of their own; beyond them every multiple of 32


def eager(model: LanguageModel, pool: Pool, requests: Sequence[Request], steps: int, width: int) -> Drawn:
    """`steps` draws of each request, each of which holds at most `width` pages."""
    rows = Rows.of(requests, width, model.lm_head.weight.device)
    with uncompiled(model):
        return _lists([rows.step(model, pool) for _ in range(steps)])


def uncompiled(model: LanguageModel) -> AbstractContextManager:
    """Run blocks that are compiled for training as they are: each new shape would be compiled for."""
    if any("compute" in vars(block) for block in model.model.layers):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def compiled_body(model: LanguageModel, batch: Batch) -> Tensor:
    """`model(batch)` for a `DecodeLayout`, every block through code compiled once for all layers that are alike."""
    decoder, layout = model.model, batch.layout
    mixers = [layer.mixer for layer in model.arch.layers]
    ropes = {mixer.rope for mixer in mixers if mixer.rope is not None}
    tables = {rope: rope.table(batch.position_ids, layout.lengths) for rope in ropes}
    x = decoder.embed(batch)
    for i, (block, mixer) in enumerate(zip(decoder.layers, mixers, strict=True)):
        x = compiled_block()(block, x, tables.get(mixer.rope), layout.of_layer(i))
    return decoder.norm(x)


def plain_block(block: Block, x: Tensor, rope: Turns | None, layout: object) -> Tensor:
    """A block as it is, whether training compiled it or not."""
    return Block.compute(block, x, rope, layout)


@cache
def compiled_block() -> Callable[[Block, Tensor, Turns | None, object], Tensor]:
    """`plain_block` compiled, apart from what training compiles."""
    # Each kind of block, for one row and for several, tables of other widths, adapters on and off: all are versions of
    # one function, and past the limit whole graphs are refused.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(plain_block, fullgraph=True)


def graphs_serve(model: LanguageModel) -> bool:
    """Whether nothing in a decode step waits for the device, and no other process takes part in it."""
    weight, layers = model.lm_head.weight, model.arch.layers
    return (
        weight.device.type == "cuda"
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and model.arch.long_after is None  # its rope is made from a list on the host
        and all(layer.mixer.head_dim <= 256 for layer in layers)
        and (weight.dtype is torch.bfloat16 or not any(isinstance(layer.ffn, Moe) for layer in layers))
        and not sharded(model)
    )


def sharded(model: LanguageModel) -> bool:
    """Whether several processes hold parts of the model's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def switched(model: LanguageModel) -> list[str | None]:
    """Which adapter is on, layer by layer."""
    return [module.active for module in model.modules() if hasattr(module, "adapters")]


class Graphs:
    """`eager` as CUDA graphs, one for each number of rows, over tensors that stay where they are.

    A graph holds addresses, and what Python decided while it was captured: for another pool, or when other adapters are
    switched on, make another one. Lengths, pages and settings are read from tensors.
    """

    def __init__(self, model: LanguageModel, pool: Pool, most: int, compiled: bool) -> None:
        self.model, self.pool, self.most = model, pool, most
        self.adapters = switched(model)
        self.forward = compiled_body if compiled and type(model.model) is Decoder else None
        self.memory = torch.cuda.graph_pool_handle()
        self._widen(64)

    def run(self, requests: Sequence[Request], steps: int, width: int) -> Drawn:
        """As `eager`."""
        if width > self.rows.table.shape[1]:
            self._widen(2 * width)
        fresh = Rows.of(requests, width)
        key = (bucket(len(requests)), fresh.truncates)
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        self.rows.load(fresh)
        graph, token, logprob = self.graphs[key]
        drawn = []
        for _ in range(steps):
            graph.replay()
            drawn.append((token[: len(requests)].clone(), logprob[: len(requests)].clone()))
        return _lists(drawn)

    def _widen(self, width: int) -> None:
        self.rows = Rows.blank(bucket(self.most), width, self.model.lm_head.weight.device)
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def _capture(self, count: int, truncates: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """One step of the first `count` rows, and the tensors that it leaves its draws in."""
        rows = replace(self.rows.each(lambda tensor: tensor[:count]), truncates=truncates)
        rows.load(Rows.blank(0, rows.table.shape[1], rows.table.device))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with uncompiled(self.model) if self.forward is None else nullcontext():
            with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they keep
                rows.step(self.model, self.pool, self.forward)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.memory):
                token, logprob = rows.step(self.model, self.pool, self.forward)
        return graph, token, logprob


def bucket(rows: int) -> int:
    """Rows of the smallest graph that serves so many requests."""
    return next((size for size in BUCKETS if size >= rows), -(-rows // 32) * 32)


def _lists(drawn: Sequence[tuple[Tensor, Tensor]]) -> Drawn:
    tokens, logprobs = (torch.stack(column, 1) for column in zip(*drawn, strict=True))
    return tokens.tolist(), logprobs.tolist()
