"""What a step of reinforcement learning has to say, as numbers for metrics.jsonl."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ftlib.checkpoint.agree import Ranks, exchange
from ftlib.rl.advantages import flat_groups
from ftlib.rl.presets import Resolved
from ftlib.rl.rewards.run import Rewards
from ftlib.rl.samples import Micro, Sample
from ftlib.rl.scoring import Everyone, gather


class StepLog:
    """Collects one step. `with log.clock("generate"):` times a part of it; `log.tokens(…)` takes a micro-batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.staleness = 0  # updates between the weights that drew and those that learn
        self._sums: Tensor | None = None
        self._most: Tensor | None = None
        self._first: Tensor | None = None

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time of a block to `seconds/<name>`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @torch.no_grad()
    def tokens(self, micro: Micro, new: Tensor, entropy: Tensor, logs: dict[str, Tensor], first: bool) -> None:
        """Numbers of a micro-batch's tokens [n]; `first`: nothing was updated since they were drawn. Never waits."""
        zero = torch.zeros_like(new)
        columns = [torch.ones_like(new), entropy, logs.get("kl", zero), logs["low"], logs["high"], logs["ratio"]]
        columns += [logs["trust"]]
        sums = torch.stack(columns).double().sum(1)
        most = torch.stack([-logs["ratio"], logs["ratio"], -logs["trust"], logs["trust"]]).double().amax(1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._most = most if self._most is None else torch.maximum(self._most, most)
        if first:
            apart = (new - micro.tokens.engine).double()
            weight = apart.clamp(-20, 20).exp()
            columns = [torch.ones_like(apart), apart.abs(), apart.abs().exp(), weight - 1 - apart, weight, weight**2]
            own = torch.cat([torch.stack(columns).sum(1), apart.abs().amax()[None]])
            if self._first is not None:
                own = torch.cat([own[:-1] + self._first[:-1], torch.maximum(own[-1:], self._first[-1:])])
            self._first = own

    def mismatch(self, run: Ranks) -> dict[str, float]:
        """How engine and trainer disagree about the same tokens and weights; empty without any. Collective."""
        parts = [part for part in _everyone(run, self._first) if part]
        if not parts:
            return {}
        count, gap, prob, k3, weight, square = (sum(part[i] for part in parts) for i in range(6))
        return {
            "mismatch/mean": gap / count,
            "mismatch/max": max(part[6] for part in parts),
            "mismatch/mult_prob_error": prob / count,
            "mismatch/k3": k3 / count,
            "mismatch/ess": weight**2 / (count * square),
        }

    def row(self, run: Ranks, has_reference: bool) -> dict[str, float]:
        """Everything about tokens and time. Collective."""
        sums = [part for part in _everyone(run, self._sums) if part]
        most = [part for part in _everyone(run, self._most) if part]
        row: dict[str, float] = {}
        if sums:
            count, *rest = (sum(part[i] for part in sums) for i in range(7))
            entropy, kl, low, high, ratio, trust = (value / count for value in rest)
            low_ratio, high_ratio, low_trust, high_trust = (max(part[i] for part in most) for i in range(4))
            row |= {"entropy": entropy} | ({"kl": kl} if has_reference else {})
            row |= {"clip_ratio/low": low, "clip_ratio/high": high, "clip_ratio/region": low + high}
            row |= {"ratio/min": -low_ratio, "ratio/mean": ratio, "ratio/max": high_ratio}
            row |= {"is_ratio/min": -low_trust, "is_ratio/mean": trust, "is_ratio/max": high_trust}
        return row | self.mismatch(run) | self.times(run)

    def times(self, run: Ranks) -> dict[str, float]:
        """Seconds of each part of the step where it took longest; of several processes, `idle`: the share of the time
        for drawing in which they waited for the last one. Collective."""
        parts = exchange(run, self.seconds) if run.world > 1 else [self.seconds]
        row = {f"seconds/{name}": max(part[name] for part in parts) for name in self.seconds}
        if run.world > 1 and row["seconds/generate"] > 0:
            drew = sum(part["generate"] for part in parts) / len(parts)
            row["idle"] = 1 - drew / row["seconds/generate"]
        return row


def reward_row(everyone: Everyone, names: Sequence[str], algorithm: Resolved) -> dict[str, float | None]:
    """Rewards and lengths of all samples of a step, over all processes."""
    scores, ended = everyone.scores, everyone.finished
    total, lengths = scores.total, scores.lengths.double()
    row = {"reward": _mean(total), "reward_std": _std(total)}
    for name, column in zip([*names, "overlong"], scores.rewards.T, strict=False):
        row |= {f"rewards/{name}/mean": _mean(column), f"rewards/{name}/std": _std(column)}
    flat = flat_groups(scores, algorithm.advantage) if len(total) else total
    row |= {
        "frac_zero_std": _mean(flat.double()),
        "length/mean": _mean(lengths),
        "length/min": float(lengths.min()),
        "length/max": float(lengths.max()),
        "length/terminated_mean": _mean(lengths[ended]),
        "truncated": _mean((~ended).double()),
    }
    return row


def step_row(
    note: StepLog, drawn: Sequence[Sample], rewards: Rewards, algorithm: Resolved, has_reference: bool, run: Ranks
) -> tuple[int, dict[str, float | None]]:
    """(tokens drawn in a step, its row of metrics), over all processes. Collective."""
    everyone = gather(drawn, rewards, run)
    row = reward_row(everyone, rewards.names, algorithm) | note.row(run, has_reference)
    row |= counts_row(drawn, rewards, run) | {"staleness": note.staleness}
    return int(everyone.scores.lengths.sum()), row


def counts_row(samples: Sequence[Sample], rewards: Rewards, run: Ranks) -> dict[str, int]:
    """What failed in a step, over all processes; the counters start anew. Collective."""
    counted = rewards.counts
    mine = {
        "reward_timeouts": counted["timeouts"],
        "reward_errors": counted["errors"],
        "unscorable": counted["unscorable"],
        "tool_calls": sum(sample.calls for sample in samples),
        "tool_failures": sum(sample.failed_calls for sample in samples),
    }
    counted.clear()
    parts = exchange(run, mine) if run.world > 1 else [mine]
    return {key: sum(part[key] for part in parts) for key in mine}


def _everyone(run: Ranks, values: Tensor | None) -> list[list[float]]:
    mine = [] if values is None else values.tolist()
    return exchange(run, mine) if run.world > 1 else [mine]


def _mean(values: Tensor) -> float | None:
    value = float(values.nanmean()) if len(values) else math.nan
    return None if math.isnan(value) else value


def _std(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.std()) if len(known) > 1 else None
