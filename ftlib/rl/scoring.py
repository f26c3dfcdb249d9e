"""Samples -> rewards, advantages and weights, over all processes: what the update needs and the log shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ftlib.checkpoint.agree import Ranks, exchange
from ftlib.losses.policy import k1, token_weights
from ftlib.rl.advantages import Scores, advantages, flat_groups, whiten_tokens
from ftlib.rl.presets import Resolved
from ftlib.rl.rewards.form import overlong_penalty
from ftlib.rl.rewards.run import Rewards
from ftlib.rl.samples import Sample

STILL = 1e-9  # an advantage below this moves nothing


@dataclass
class Everyone:
    """One number of every sample of the step, over all processes, and which of them are this one's."""

    scores: Scores
    own: slice
    finished: Tensor  # bool [S]: ended by itself


def give_rewards(samples: Sequence[Sample], rewards: Rewards, algorithm: Resolved, longest: int) -> None:
    """Ask every reward function about every sample, and add up (the soft penalty on length included)."""
    if not samples:
        return
    names = set.intersection(*(set(sample.prompt.columns) for sample in samples))
    values = rewards(
        [sample.prompt.messages for sample in samples],
        [sample.messages for sample in samples],
        [sample.ids for sample in samples],
        {name: [sample.prompt.columns[name] for sample in samples] for name in sorted(names)},
        [sample.prompt.text for sample in samples],
    )
    weights = torch.tensor(rewards.weights, dtype=torch.float64)
    for i, sample in enumerate(samples):
        sample.rewards = [column[i] for column in values]
        if algorithm.overlong == "soft":
            margin = max(1, round(longest * algorithm.overlong_margin))
            sample.rewards.append(overlong_penalty(len(sample.ids), longest, margin))
    scores = _scores(samples, weights)
    for sample, value in zip(samples, scores.total.tolist(), strict=True):
        sample.reward = value


def gather(samples: Sequence[Sample], rewards: Rewards, run: Ranks) -> Everyone:
    """The step's numbers from all processes; groups are numbered apart. Collective."""
    mine = [[s.rewards, s.group, s.length, s.finish != "length"] for s in samples]
    parts = exchange(run, mine) if run.world > 1 else [mine]
    rows = [(rank, *row) for rank, part in enumerate(parts) for row in part]
    groups = [(rank, group) for rank, _, group, _, _ in rows]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    weights = torch.tensor(rewards.weights, dtype=torch.float64)
    columns = len(rows[0][1]) if rows else len(weights)
    scores = Scores(
        _table([row[1] for row in rows], columns),
        _padded(weights, columns),
        torch.tensor([numbers[name] for name in groups], dtype=torch.int64),
        torch.tensor([row[3] for row in rows], dtype=torch.int64),
    )
    first = sum(map(len, parts[: run.rank]))
    finished = torch.tensor([row[4] for row in rows], dtype=torch.bool)
    return Everyone(scores, slice(first, first + len(mine)), finished)


def give_advantages(samples: Sequence[Sample], everyone: Everyone, algorithm: Resolved, run: Ranks) -> None:
    """Fill `advantages` of every sample, float32 [drawn tokens]. Collective."""
    if algorithm.advantage == "teacher":  # on-policy distillation: each token's own reverse divergence
        for sample in samples:
            sample.advantages = -k1(sample.old, sample.ref)
        return
    if algorithm.token_advantages:
        mine = [k1(sample.old, sample.ref).tolist() for sample in samples]
        parts = exchange(run, mine) if run.world > 1 else [mine]
        penalties = [torch.tensor(values, dtype=torch.float64) for part in parts for values in part]
        values = whiten_tokens(everyone.scores.total, penalties, algorithm.kl_coef)[everyone.own]
        for sample, value in zip(samples, values, strict=True):
            sample.advantages = value.float()
        return
    values = advantages(everyone.scores, algorithm.advantage)[everyone.own]
    for sample, value in zip(samples, values, strict=True):
        sample.advantages = value.float().expand(sample.length)


def give_weights(
    part: Sequence[Sample], algorithm: Resolved, longest: int, run: Ranks
) -> tuple[list[Sample], int]:
    """Fill `weight` with the one denominator of an optimizer step on `part` (this process's share of it).

    Returns the samples that have a gradient, and the drawn tokens of all processes that do: none of them when every
    advantage is 0. Samples without a gradient count in the denominator all the same. Collective.
    """
    masked = [algorithm.overlong == "mask" and sample.finish == "length" for sample in part]
    moved = [algorithm.objective.kl_coef > 0 or bool((s.advantages.abs() > STILL).any()) for s in part]
    lengths = [0 if out else sample.length for sample, out in zip(part, masked, strict=True)]
    mine = [[length, sample.group, moves] for length, sample, moves in zip(lengths, part, moved, strict=True)]
    parts = exchange(run, mine) if run.world > 1 else [mine]
    rows = [(rank, *row) for rank, own in enumerate(parts) for row in own]
    numbers = {name: i for i, name in enumerate(dict.fromkeys((row[0], row[2]) for row in rows))}
    groups = torch.tensor([numbers[row[0], row[2]] for row in rows], dtype=torch.int64)
    every = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    weights = token_weights(every, groups, algorithm.aggregation, longest)
    first = sum(map(len, parts[: run.rank]))
    for sample, weight in zip(part, weights[first : first + len(mine)].tolist(), strict=True):
        sample.weight = weight
    trained = [sample for sample, moves in zip(part, moved, strict=True) if moves and sample.weight > 0]
    return trained, sum(row[1] for row in rows if row[3])


def split(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """`count` parts for as many optimizer steps; those of one prompt stay together. Parts may be empty."""
    groups = [list(members) for _, members in groupby(samples, key=lambda sample: sample.group)]
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for number, members in enumerate(groups):
        parts[number * count // len(groups)] += members
    return parts


def differing(samples: Sequence[Sample], rewards: Rewards, kind: str) -> list[Sample]:
    """Samples of groups whose members did not all earn the same (dynamic sampling, arXiv 2503.14476, section 3.2)."""
    if not samples:
        return []
    weights = torch.tensor(rewards.weights, dtype=torch.float64)
    flat = flat_groups(_scores(samples, weights), kind)
    return [sample for sample, same in zip(samples, flat.tolist(), strict=True) if not same]


def enough(samples: Sequence[Sample], count: int, run: Ranks) -> bool:
    """Whether every process has `count` samples. Collective."""
    have = exchange(run, len(samples)) if run.world > 1 else [len(samples)]
    return min(have) >= count


def _scores(samples: Sequence[Sample], weights: Tensor) -> Scores:
    groups = torch.tensor([sample.group for sample in samples], dtype=torch.int64)
    lengths = torch.tensor([sample.length for sample in samples], dtype=torch.int64)
    columns = len(samples[0].rewards)
    return Scores(_table([s.rewards for s in samples], columns), _padded(weights, columns), groups, lengths)


def _padded(weights: Tensor, columns: int) -> Tensor:
    """A weight for each reward, and 1 for the penalty that may stand behind them."""
    return torch.cat([weights, torch.ones(columns - len(weights), dtype=torch.float64)])


def _table(rows: Sequence[Sequence[float | None]], columns: int) -> Tensor:
    """float64 [S, columns], NaN for None."""
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(len(rows), columns)
