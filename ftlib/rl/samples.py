"""Completions of prompts, as they go from the engine to the update: token ids that are never made from text again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlib.data.packing import pack as fill
from ftlib.data.prompts import Prompt
from ftlib.layers.batch import IGNORED, Batch, from_documents
from ftlib.losses.policy import Tokens

MOST = 64  # completions that share a row, so that shapes are the same in every step


@dataclass(eq=False)
class Sample:
    """One completion of one prompt.

    `ids` follow the prompt: tokens the model drew and, between its turns, tokens that others said. `drawn` and the
    engine's `logprobs` have an entry for each (0.0 for a token of others). `group`: which prompt of the step it
    answers. Tensors have an entry for each drawn token, float32: `advantages`; `old`: the trainer's log-probabilities
    before the update; `ref`: the reference policy's.
    """

    prompt: Prompt
    group: int
    ids: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "length"
    messages: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    reward: float = float("nan")
    advantages: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    weight: float = 0.0
    calls: int = 0
    failed_calls: int = 0

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Add tokens the model drew, or with None for log-probabilities tokens of others."""
        self.ids += ids
        self.drawn += [logprobs is not None] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)

    @property
    def length(self) -> int:
        """Tokens that the model drew."""
        return sum(self.drawn)

    @property
    def engine(self) -> Tensor:
        """The engine's log-probability of each drawn token."""
        pairs = zip(self.logprobs, self.drawn, strict=True)
        return torch.tensor([value for value, drawn in pairs if drawn], dtype=torch.float32)

    def document(self) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of prompt and completion: labels are the drawn tokens, shifted once."""
        ids = np.array([*self.prompt.ids, *self.ids], np.int64)
        labels = np.full(len(ids), IGNORED, np.int64)
        drawn = np.array([False] * len(self.prompt.ids) + self.drawn)
        np.copyto(labels[:-1], ids[1:], where=drawn[1:])
        return ids, labels


@dataclass(eq=False)
class Micro:
    """A forward pass of the update: packed completions, `at`: where in the B*T positions their drawn tokens are
    predicted, int64 [n], in the order of `tokens`. `samples` is empty where it is `idle`."""

    batch: Batch
    at: Tensor
    tokens: Tokens
    samples: list[Sample]

    def to(self, device: torch.device) -> "Micro":
        """The same on `device`."""
        moved = {k: v.to(device) for k, v in vars(self.tokens).items() if isinstance(v, Tensor)}
        return Micro(self.batch.to(device), self.at.to(device), replace(self.tokens, **moved), self.samples)


def pack(samples: Sequence[Sample], seq_len: int, micro_rows: int, pad_id: int) -> list[Micro]:
    """Completions in rows of `seq_len` tokens, `micro_rows` rows at a time; none is split, none is padded alone."""
    if not samples:
        return []
    lengths = np.array([len(sample.prompt.ids) + len(sample.ids) for sample in samples])
    rows = fill(lengths, seq_len, 0, 0, MOST)
    rows += [[] for _ in range(-len(rows) % micro_rows)]
    found = []
    for start in range(0, len(rows), micro_rows):
        members = [[samples[index] for index in row] for row in rows[start : start + micro_rows]]
        found.append(_micro(members, seq_len, pad_id))
    return found


def idle(seq_len: int, micro_rows: int, pad_id: int) -> Micro:
    """A micro-batch of nobody's completions: its one token weighs 0, and it takes part in every collective."""
    nobody = Sample(Prompt([], [pad_id], {}, ""), 0)
    nobody.append([pad_id], [0.0])
    nobody.advantages = nobody.old = nobody.ref = torch.zeros(1)
    micro = _micro([[nobody], *([] for _ in range(micro_rows - 1))], seq_len, pad_id)
    micro.samples = []
    return micro


def _micro(rows: list[list[Sample]], seq_len: int, pad_id: int) -> Micro:
    batch = from_documents([[sample.document() for sample in row] for row in rows], seq_len, pad_id, MOST)
    samples = [sample for row in rows for sample in row]
    counts = torch.tensor([sample.length for sample in samples])
    tokens = Tokens(
        sequence=torch.arange(len(samples)).repeat_interleave(counts),
        sequences=len(samples),
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32).repeat_interleave(counts),
        advantages=_joined(samples, "advantages"),
        engine=_joined(samples, "engine"),
        old=_joined(samples, "old"),
        ref=_joined(samples, "ref"),
    )
    at = (batch.labels.flatten() != IGNORED).nonzero()[:, 0]
    return Micro(batch, at, tokens, samples)


def _joined(samples: list[Sample], name: str) -> Tensor | None:
    values = [getattr(sample, name) for sample in samples]
    return None if any(value is None for value in values) else torch.cat(values).float()


def log_probabilities(
    samples: Sequence[Sample], micros: Sequence[Micro], of: Callable[[Micro], Tensor]
) -> list[Tensor]:
    """Of each sample the values that `of(micro)` gives for its drawn tokens, float32 on the host, in their order."""
    found: dict[int, Tensor] = {}
    for micro in micros:
        values = of(micro).float().cpu()
        if micro.samples:
            parts = values.split([sample.length for sample in micro.samples])
            found |= {id(sample): part for sample, part in zip(micro.samples, parts, strict=True)}
    return [found[id(sample)] for sample in samples]
