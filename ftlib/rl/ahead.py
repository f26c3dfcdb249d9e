"""Completions of the next step, drawn by another process while this one learns: their weights are one update old."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ftlib.data.prompts import Prompt
from ftlib.errors import UserError
from ftlib.generation.remote import RemoteEngine
from ftlib.models import LanguageModel
from ftlib.parallel.run import Run
from ftlib.rl.presets import resolve
from ftlib.rl.rollouts import Place, Rollouts
from ftlib.rl.samples import Sample

KEPT = ("group", "ids", "drawn", "logprobs", "finish", "messages", "calls", "failed_calls")
WAITING = "drawn_ahead"  # their name in `counters`


def rollouts(cfg: Any, local: Rollouts, model: LanguageModel, counters: dict[str, Any], run: Run) -> "Rollouts | Ahead":
    """What draws a run's completions: `local`, or with rollout.staleness a process on the GPU behind this one."""
    if not cfg.rollout.staleness:
        counters.pop(WAITING, None)  # of an earlier part of this run
        return local
    device = torch.device("cuda", run.device.index + 1) if run.device.type == "cuda" else run.device
    engine = RemoteEngine(model, device, cfg.rollout.max_batch)
    return Ahead(Rollouts(cfg.rollout, engine, local.tokenizer, local.dialogues), engine, counters)


def problems(cfg: Any, world: int) -> list[str]:
    """What does not go together with drawing ahead."""
    found = []
    if world > 1:
        found.append(("one process learns, and starts the one that draws", "rollout.staleness, parallel", "start one"))
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        found.append(("drawing ahead takes a second GPU", "rollout.staleness", "set it to 0"))
    if resolve(cfg.algorithm).dynamic_sampling:
        what = "prompts that replace others are known only when the others are drawn"
        found.append((what, "rollout.staleness, algorithm.dynamic_sampling", "leave one of them out"))
    if cfg.model.quantize:
        found.append(("quantized matrices are not handed over", "rollout.staleness, model.quantize", "leave one out"))
    if cfg.model.fp8 and cfg.lora is not None:
        what = "below adapters, model.fp8 keeps weights in 8 bits, which are not handed over"
        found.append((what, "rollout.staleness, model.fp8", "leave one out"))
    if cfg.model.code is not None:
        what = "the other process has the library's own model"
        found.append((what, "rollout.staleness, model.code", "leave one out"))
    if cfg.lora is not None and cfg.lora.modules_to_save:
        what = "modules that are trained whole are not folded into what is handed over"
        found.append((what, "rollout.staleness, lora.modules_to_save", "leave one out"))
    return [str(UserError(what, where=where, fix=fix)) for what, where, fix in found]


class Ahead:
    """As `Rollouts`, with an engine elsewhere. What `begin` asked for, `settle` leaves in `counters`, which go into a
    checkpoint, and the call for that place finds it there: a run that goes on learns from the same completions."""

    def __init__(self, rollouts: Rollouts, engine: RemoteEngine, counters: dict[str, Any]) -> None:
        self.rollouts, self.engine, self.counters, self.age = rollouts, engine, counters, 0
        self._thread = ThreadPoolExecutor(1)
        self._place: Place | None = None
        self._next: Future[list[Sample]] | None = None

    def __call__(self, prompts: Sequence[Prompt], n: int, place: Place) -> list[Sample]:
        """The samples of a place: those drawn ahead, or, before anything was, drawn now."""
        found = self.counters.pop(WAITING, None)
        self.age = int(found is not None and [found["place"], found["drawn_at"]] == [list(place), self._settings])
        if not self.age:
            self.engine.load()
            return self.rollouts(prompts, n, place)
        return [Sample(prompts[row["group"]], **row) for row in found["samples"]]

    def begin(self, prompts: Sequence[Prompt], n: int, place: Place) -> None:
        """Start on the samples of a place, with the weights of now."""
        self.engine.load()
        self._place, self._next = place, self._thread.submit(self.rollouts, prompts, n, place)

    def settle(self) -> None:
        """Wait until what `begin` asked for is there."""
        rows = [{key: getattr(sample, key) for key in KEPT} for sample in self._next.result()]
        self.counters[WAITING] = {"place": list(self._place), "drawn_at": self._settings, "samples": rows}

    @property
    def _settings(self) -> list[float]:
        """What a run that goes on may have changed, and what is waiting was not drawn with."""
        return [self.rollouts.cfg.temperature, self.rollouts.cfg.max_new_tokens]

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *ended: object) -> None:
        self.engine.close()
        self._thread.shutdown()
