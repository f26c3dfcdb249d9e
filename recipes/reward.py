"""Reward models: a score for whole answers, learnt from pairs of them, or for each step of an answer.

    tune run recipes/reward.py --config configs/demo_reward.yaml reward.centre=0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftlib import build, optim
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.launch import launch, script
from ftlib.loop import Boundary
from ftlib.observe.output import Output, trained_share
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.preference import reward
from ftlib.sections import (
    Batch,
    Checkpoint,
    Data,
    Eval,
    Log,
    Lora,
    Memory,
    Model,
    Optim,
    Parallel,
    Reward,
    Schedule,
    Tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    reward: Reward = Reward()
    lora: Lora | None = Lora(modules_to_save=("score",))  # null: every weight trains, at a learning rate of about 1e-5
    data: Data
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    optim: Optim = Optim(lr=1e-4)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # order of the data, initial adapters, dropout
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights and the arithmetic; adapters and losses are fp32
    deterministic: bool = False  # equal runs give equal bits on a GPU too, at some cost
    output_dir: OutputDir = Path("output/reward")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save; returns the rows of metrics.jsonl."""
    build.check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    model = build.model(cfg, run)
    optimizer = optim.build(model, cfg.optim)
    evaluate = reward.RewardEvaluation(cfg, rows, run, loader.max_documents)

    output = Output(cfg, run, model, steps)
    state = State(model, optimizer, loader, extra=output.counters)
    saver = Saver(cfg.checkpoint, cfg.output_dir, run, build.fingerprint(cfg, rows), output.say)
    if saver.finished() == steps:
        return output.already_finished()
    done = saver.resume(state)

    with output.begin(done, rows.report.lines()), Boundary(cfg, run, steps, evaluate, output, saver, state) as boundary:
        output.say(trained_share(model))
        if done == 0:
            boundary.score(0)

        for step in range(done + 1, steps + 1):
            with output.waiting():
                batch = next(loader)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            # Pairs or steps over all devices: each micro-batch adds its part of one mean over them.
            count = sum(map(len, batch.packs)) if cfg.reward.kind == "pairs" else batch.target_tokens
            loss = torch.zeros((), dtype=torch.float64, device=run.device)
            sums = torch.zeros(len(reward.FIGURES) + 1, dtype=torch.float64, device=run.device)  # for the log
            for micro in batch.micro_batches:
                micro = micro.to(run.device, non_blocking=True)
                values, counted = reward.loss(reward.scores(model, micro, cfg.reward), micro, cfg.reward)
                part = values.sum() / count
                part.backward()
                loss += part.detach()
                sums += counted
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens, reward.figures(run.total(sums)))
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        with final_folder(run, cfg.output_dir) as folder:
            reward.save(model, tokenizer, folder, run.is_main)
        saver.finish(steps)
        output.finish(f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}")
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
