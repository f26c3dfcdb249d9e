"""Completions for people: rollouts.jsonl, a table on the screen now and then, and a word when something is wrong."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.errors import UserError
from ftlib.observe.metrics import MetricsFile
from ftlib.observe.output import Output
from ftlib.parallel.run import Run
from ftlib.rl import presets
from ftlib.rl.log import StepLog
from ftlib.rl.samples import Sample

NAME = "rollouts.jsonl"
WIDTH = 60  # characters of a prompt or completion in a table
EMPTY = 3  # steps in a row without anything to learn before it is said
SAME = 1e-9  # a standard deviation of rewards below this is none


class Pages:
    """What a person reads about a run's completions. Rows of steps that a resumed run does again are dropped."""

    def __init__(self, cfg: Any, run: Run, output: Output, done: int) -> None:
        self.cfg, self.output, self._checked = cfg.rollout, output, False
        self.algorithm = presets.resolve(cfg.algorithm)
        self._empty, self._moved = 0, False
        self.file = MetricsFile(cfg.output_dir, enabled=run.is_main, name=NAME)
        self.file.truncate_after(done if done else -1)

    def write(self, step: int, samples: Sequence[Sample], names: Sequence[str], row: Mapping[str, Any]) -> None:
        """The first completions of a step; `row`: what metrics.jsonl has of it."""
        for sample in samples[: self.cfg.show]:
            self.file.write(record(step, sample, names))
        if self.cfg.show_every and (step == 1 or step % self.cfg.show_every == 0):
            self.output.say(f"completions of step {step}:")
            for line in lines(samples, self.cfg.show):
                self.output.say(line)
        self._empty = 0 if self._moved and not same(row, self.algorithm.advantage) else self._empty + 1
        self._moved = False
        if self._empty == EMPTY:
            self.output.say(f"warning: nothing to learn from in {EMPTY} steps: {self._why(row)}")

    def learns(self, tokens: int) -> bool:
        """Whether an update has `tokens` to learn from; a step in which none has counts as empty."""
        self._moved = self._moved or tokens > 0
        return tokens > 0

    def _why(self, row: Mapping[str, Any]) -> str:
        """What a step without anything to learn means, and the keys to look at."""
        among = "the step" if self.algorithm.advantage == "whiten" else "a prompt"
        what = f"all completions of {among} that were scored earn the same (frac_zero_std, reward_std)"
        if self.algorithm.advantage == "teacher":
            return "every token is as likely to the teacher (teacher.path) as to the model"
        if row["reward"] is None:
            what = "no completion was scored (unscorable)"
        elif not same(row, self.algorithm.advantage):
            what = "all completions that differ are left out (algorithm.overlong)"
        what += "; only the divergence moves weights (algorithm.kl_coef)" if self.algorithm.kl_coef else ""
        cut = "every completion is cut off: raise rollout.max_new_tokens. " if row["truncated"] == 1 else ""
        look = "Look at rollouts.jsonl; a finer reward (rewards), other prompts (data.sources), a higher"
        return f"{what}. {cut}{look} rollout.temperature or a larger rollout.group may help"

    def check(self, note: StepLog, run: Run) -> None:
        """Before the first update, look at how engine and trainer agree: UserError when nothing can be learned so.

        Collective. A step without anything to learn, or drawn with older weights, leaves the look to the next."""
        if self._checked or note.staleness:
            return
        found = note.mismatch(run)
        self._checked = bool(found)
        gap, most = found.get("mismatch/mean", 0.0), found.get("mismatch/max", 0.0)
        said = f"engine and trainer differ by {gap:.2g} in log-probability (at most {most:.2g})"
        if not gap <= self.cfg.mismatch_abort:
            raise UserError(
                f"{said}: what is trained is not what drew the completions",
                where="rollout.mismatch_abort",
                fix="take dtype=fp32, or raise the limit if the difference is understood",
            )
        if gap > self.cfg.mismatch_warn:
            self.output.say(f"{said}; algorithm.correction weighs tokens by it")


def same(row: Mapping[str, Any], advantage: str) -> bool:
    """Whether the rewards of a step tell no completion from those that it is compared with."""
    if advantage == "teacher":  # which looks at no reward
        return False
    return (row["reward_std"] or 0.0) < SAME if advantage == "whiten" else row["frac_zero_std"] == 1


def lines(samples: Sequence[Sample], count: int) -> list[str]:
    """A table of the first `count` completions: reward, advantage, tokens, how they ended, what was asked and said.

    No advantage ("-") is one that nothing is learned from: held out, or left out by dynamic sampling."""
    rows = [("reward", "advantage", "tokens", "end", "prompt -> completion")]
    for sample in samples[:count]:
        said = f"{_short(sample.prompt.messages)} -> {_short(sample.messages)}"
        advantage = _advantage(sample)
        moved = "-" if advantage is None else f"{advantage:+.2f}"
        rows.append((f"{sample.reward:.3g}", moved, str(sample.length), sample.finish, said))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  " + "  ".join([*(row[i].rjust(widths[i]) for i in range(4)), row[4]]) for row in rows]


def record(step: int, sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    """A completion as a row of rollouts.jsonl."""
    return {
        "step": step,
        "prompt": sample.prompt.messages,
        "completion": sample.messages,
        "reward": sample.reward,
        "rewards": dict(zip([*names, "overlong"], sample.rewards, strict=False)),
        "advantage": _advantage(sample),
        "tokens": sample.length,
        "finish": sample.finish,
        "where": sample.prompt.where,
        "columns": sample.prompt.columns,
    }


def answer(sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    """A held-out completion as a row of samples.jsonl: prompt and answer as text, and what it earned."""
    row = record(0, sample, names)
    texts = {"prompt": _text(sample.prompt.messages), "answer": _text(sample.messages)}
    return texts | {key: row[key] for key in ("reward", "rewards", "tokens", "finish", "where", "columns")}


def _advantage(sample: Sample) -> float | None:
    """Of a completion; the mean where its tokens have their own."""
    values = sample.advantages
    if values is None:
        return None
    return float(values.mean()) if len(values) else 0.0


def _text(messages: Sequence[dict[str, Any]]) -> str:
    """What the messages say; more than one with their roles."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def _short(messages: Sequence[dict[str, Any]]) -> str:
    text = " ".join(json.dumps(m.get("content"), ensure_ascii=False)[1:-1] for m in messages)
    return f"'{text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}'"
