"""Held-out prompts answered greedily and scored by the run's own rewards."""

from typing import Any

import torch

from ftlib.data.prompts import Prompt
from ftlib.models import LanguageModel
from ftlib.observe.said import Said
from ftlib.parallel.run import Run
from ftlib.rl import log, pages
from ftlib.rl.presets import Resolved
from ftlib.rl.rewards.run import Rewards, names
from ftlib.rl.rollouts import Rollouts
from ftlib.rl.samples import Sample
from ftlib.rl.scoring import gather, give_rewards
from ftlib.sections.rl import Greedy


def scores(cfg: Any) -> list[str]:
    """What the numbers of an evaluation are called."""
    each = names(cfg.rewards)
    return ["eval_reward", "eval_length", *(f"eval_rewards/{name}" for name in each if len(each) > 1)]


class Held:
    """`held(model)` -> `eval_reward`, one for each function, and how long answers are; `samples()` to read."""

    def __init__(
        self, cfg: Greedy, prompts: list[Prompt], rollouts: Rollouts, rewards: Rewards, algorithm: Resolved, run: Run
    ) -> None:
        self.cfg, self.rollouts, self.rewards, self.algorithm, self.run = cfg, rollouts, rewards, algorithm, run
        self.prompts = prompts[run.data_rank :: run.data_ranks]
        self.any = bool(prompts)
        self._last: list[Sample] = []

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """One evaluation; every process must call it. The engine looks at the model's weights anew."""
        if not self.any:
            return {}
        with torch.random.fork_rng():
            self.rollouts.engine.refresh()
            self._last = self.rollouts(self.prompts, 1, (0, 0, 0, self.run.data_rank), greedy=True)
            give_rewards(self._last, self.rewards, self.algorithm, self.rollouts.cfg.max_new_tokens)
            everyone = gather(self._last, self.rewards, self.run)
            row = log.reward_row(everyone, self.rewards.names, self.algorithm)
            self.rollouts.engine.release()
            self.rewards.counts.clear()
        kept = {"reward": "eval_reward", "length/mean": "eval_length"}
        found = {name: row[key] for key, name in kept.items()}
        each = {f"eval_rewards/{name}": row[f"rewards/{name}/mean"] for name in self.rewards.names}
        if len(each) > 1:
            found |= each
        # Prompts that some reward could not score lie outside of its mean: say how many.
        if lost := int(everyone.scores.rewards.isnan().any(1).sum()):
            found["eval_unscorable"] = lost
        return {key: value for key, value in found.items() if value is not None}

    def samples(self) -> list[Said]:
        """A table of the first few of the last answers; their rows are those of rollouts.jsonl."""
        if not self._last or not self.cfg.samples:
            return []
        head, *lines = pages.lines(self._last, self.cfg.samples)
        named = zip(lines, self._last, strict=False)
        return [Said(head), *(Said(line, pages.answer(one, self.rewards.names)) for line, one in named)]
