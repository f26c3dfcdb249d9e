"""An engine in a process of its own, on another device: it draws while the process that asked computes."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlib.generation.engine import Engine
from ftlib.generation.merged import Merged
from ftlib.generation.params import Completion, SamplingParams
from ftlib.generation.process import Worker, passing, serve
from ftlib.models import LanguageModel


class RemoteEngine:
    """`generate` as `Engine` has it, with the weights of `model` as they were at the last `load`, adapters folded in.

    Both wait for the other process; to go on meanwhile, call `generate` from a thread.
    """

    def __init__(self, model: LanguageModel, device: torch.device, max_batch: int) -> None:
        self.merged = Merged(model)
        parts, dtype = (model.arch, model.table, model.config), model.lm_head.weight.dtype
        self.worker = Worker("ftlib.generation.remote", parts, dtype, model.model.backend, str(device), max_batch)

    def load(self) -> None:
        """Hand the weights over as they are now."""
        self.merged.refresh()
        weights = {name: t.detach().cpu().contiguous() for name, t in _tensors(self.merged.model)}
        with passing(sum(weight.nbytes for weight in weights.values())) as folder:
            file = Path(folder) / "weights.safetensors"
            save_file(weights, file)
            self.worker.call("load", str(file))

    def generate(self, prompts: list[list[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt."""
        return self.worker.call("generate", prompts, params, n)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.worker.close()


def start(
    parts: tuple[Any, ...], dtype: torch.dtype, backend: str, device: str, max_batch: int
) -> Mapping[str, Callable[..., Any]]:
    """The other end: an engine over a model that has no weights yet."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with torch.device("meta"):
        model = LanguageModel(*parts).to(dtype)
    model.model.use_attention(backend)
    model.to_empty(device=device)
    model.tie()
    engine = Engine(model.eval().requires_grad_(False), max_batch=max_batch)
    return {"load": partial(_load, engine), "generate": engine.generate}


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """All that a model computes with, by name, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _load(engine: Engine, file: str) -> None:
    weights = load_file(file)
    for name, tensor in _tensors(engine.model):
        tensor.copy_(weights[name])
    engine.refresh()


if __name__ == "__main__":
    serve(sys.argv[1], start)
