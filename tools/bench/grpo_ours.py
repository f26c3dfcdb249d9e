"""Our contender for reinforcement learning: the step of recipes/grpo.py, drawing, looking back, learning.

Completions never stop early, so that all steps do the same work. A reward that looks at nothing stands for real ones.
"""

import json
import tempfile
from pathlib import Path

import common
import torch

import ftlib
from ftlib import build, optim, plugins
from ftlib.data.prompts import Prompt
from ftlib.generation import Engine
from ftlib.models.load import base_state
from ftlib.parallel import run as processes
from ftlib.quant.frozen import FrozenWeight
from ftlib.rl import presets, scoring, setup
from ftlib.rl.environments import Dialogues
from ftlib.rl.log import StepLog, reward_row
from ftlib.rl.rewards.run import Rewards
from ftlib.rl.rollouts import Rollouts
from ftlib.sections import Lora, Memory, Model, Optim, Source
from ftlib.sections.rl import Dialogue, MicroBatch, Prompts, Reward, Rollout

RECIPE = plugins.load_file(common.ROOT / "recipes" / "grpo.py")


class Endless:
    """A tokenizer without an end of turn: every completion has all its tokens."""

    stop_ids: frozenset[int] = frozenset()
    filler_id = 0

    def decode(self, ids: list[int]) -> str:
        return str(ids[0]) if ids else ""


class Quiet:
    """What `learn` tells of each update."""

    def check(self, note: StepLog, run: processes.Run) -> None:
        self.mismatch = note.mismatch(run)

    def learns(self, tokens: int) -> bool:
        return tokens > 0


def main() -> None:
    work = common.job()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(common.config_of(work["shape"])))
    sizes = {key: work[key] for key in ("prompts", "group")}
    reward = Reward(fn="length", args={"target": work["new_tokens"] // 2})
    cfg = RECIPE.Config(
        model=Model(path=str(folder), quantize=work["quantize"]),
        lora=Lora(rank=work["rank"], alpha=2 * work["rank"]) if work["rank"] else None,
        data=Prompts(sources=(Source(path="none"),), seq_len=work["seq_len"]),
        rewards=(reward,),
        dialogue=Dialogue(),
        rollout=Rollout(**sizes, max_new_tokens=work["new_tokens"]),
        batch=MicroBatch(micro_rows=work["micro_rows"]),
        optim=Optim(lr=1e-5),
        memory=Memory(recompute=work["recompute"]),
    )
    run = processes.start(cfg.parallel, cfg.seed)
    object.__setattr__(cfg, "from_scratch", True)  # weights are drawn: there are none to read
    model, algorithm = build.model(cfg, run), presets.resolve(cfg.algorithm)
    for name, weight in base_state(model).items():
        if isinstance(weight, FrozenWeight):  # drawing fills plain matrices only
            weight.fill(common.weight(name, weight.shape))
    optimizer, engine = optim.build(model, cfg.optim), Engine(model, max_batch=cfg.rollout.max_batch)
    rollouts = Rollouts(cfg.rollout, engine, Endless(), Dialogues(cfg.dialogue))
    draw = torch.Generator().manual_seed(0)
    vocab, rows = model.arch.vocab, []
    with Rewards(cfg.rewards) as rewards:
        for step in range(1, work["steps"] + 1):
            ids = torch.randint(0, vocab, (cfg.rollout.prompts, work["prompt_tokens"]), generator=draw).tolist()
            prompts = [Prompt([{"role": "user", "content": ""}], own, {}, "") for own in ids]
            rows.append(one(cfg, step, prompts, model, optimizer, engine, rollouts, rewards, algorithm, run))
    common.report_steps("ftlib", work, rows, {"ftlib": ftlib.__version__})


def one(cfg, step, prompts, model, optimizer, engine, rollouts, rewards, algorithm, run) -> dict[str, float]:  # noqa: ANN001
    """One step of the recipe, timed."""
    common.forget_peak()
    note, quiet = StepLog(), Quiet()
    with note.clock("generate"):
        samples = rollouts(prompts, cfg.rollout.group, (cfg.seed, step, 0, 0))
    with note.clock("reward"):
        scoring.give_rewards(samples, rewards, algorithm, cfg.rollout.max_new_tokens)
    for number, sample in enumerate(samples):  # all are as long: make them differ, so that all are learned from
        sample.rewards = [float(number % 2)]
    engine.release()
    with note.clock("logprobs"):
        setup.look_back(cfg, samples, model, setup.Reference(cfg, model, algorithm, run), 0, run)
    everyone = scoring.gather(samples, rewards, run)
    scoring.give_advantages(samples, everyone, algorithm, run)
    with note.clock("train"):
        RECIPE.learn(cfg, samples, model, optimizer, 0, run, note, quiet)[1].item()
    engine.refresh()
    drawn = float(everyone.scores.lengths.sum())
    row = {key: round(value, 3) for key, value in note.row(run, False).items() if key.startswith("seconds/")}
    total = sum(row.values())
    row |= {key: round(value, 6) for key, value in quiet.mismatch.items()}
    row["drawn_tokens_per_s"] = round(drawn / row["seconds/generate"])
    row["samples_per_s"] = round(len(samples) / total, 2)
    row["length"] = reward_row(everyone, rewards.names, algorithm)["length/mean"]
    return row | {"step_s": round(total, 3), "peak_gib": common.peak_gib()}


if __name__ == "__main__":
    main()
