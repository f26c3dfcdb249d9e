"""Supervised fine-tuning of every weight of a model.

    tune run recipes/full_sft.py --config configs/demo_full.yaml optim.lr=1e-4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftlib import build, models, optim, quant
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.evaluation.evaluate import Evaluation
from ftlib.launch import launch, script
from ftlib.loop import Boundary
from ftlib.losses.balancing import Balance
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models.noise import add_noise
from ftlib.observe.output import Output
from ftlib.optim import lisa
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.sections import (
    Batch,
    Checkpoint,
    Data,
    Eval,
    Lisa,
    Log,
    Loss,
    Memory,
    Model,
    Optim,
    Parallel,
    Qat,
    Schedule,
    Tokenizer,
    Train,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    train: Train = Train()
    lisa: Lisa = Lisa()
    data: Data
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    qat: Qat | None = None  # train against the rounding of recipes/quantize.py; null: none
    loss: Loss = Loss()
    neftune: float = 0.0  # noise on embeddings while training (arXiv 2310.05914); 5 is usual, 0 is none
    optim: Optim = Optim(lr=2e-5)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # order of the data
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, optimizer state and arithmetic
    deterministic: bool | Literal["elastic"] = False  # equal bits in equal runs; elastic: and on any dp_replicate
    profile: bool = False  # trace three steps: where their time and memory go
    output_dir: OutputDir = Path("output/full_sft")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save; returns the rows of metrics.jsonl."""
    build.check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    model = build.model(cfg, run)
    add_noise(model, cfg.neftune)
    balance = Balance(model, cfg.loss)
    optimizer = optim.build(model, cfg.optim)
    evaluate = Evaluation(cfg, rows, tokenizer, run, loader.max_documents)

    output = Output(cfg, run, model, steps)
    state = State(model, optimizer, loader, extra=output.counters)
    saver = Saver(cfg.checkpoint, cfg.output_dir, run, build.fingerprint(cfg, rows), output.say)
    if saver.finished() == steps:
        return output.already_finished()
    done = saver.resume(state)

    with output.begin(done, rows.report.lines()), Boundary(cfg, run, steps, evaluate, output, saver, state) as boundary:
        if done == 0:
            boundary.score(0)

        for step in range(done + 1, steps + 1):
            lisa.at(step, model, optimizer)  # where `lisa` says so, most layers sleep
            quant.at(step, model)  # where `qat` says so, layers are rounded from here on
            with output.waiting():
                batch = next(loader)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            loss = torch.zeros((), dtype=torch.float64, device=run.device)  # wide: sums alike in any order
            for micro in batch.micro_batches:
                micro = micro.to(run.device, non_blocking=True)
                # Each micro-batch on each device adds its part of one weighted mean over the step's target tokens.
                hidden, head, terms = model(micro), model.lm_head.weight, model.logit_terms | {"weights": micro.weights}
                part = next_token_loss(hidden, head, micro.labels, micro.target_tokens, cfg.loss, **terms)
                part = (part + balance(micro)) / batch.target_weight
                part.backward()
                loss += part.detach()
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens, balance.column(run, batch))
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        with final_folder(run, cfg.output_dir) as folder:
            models.save_pretrained(model, folder, write=run.is_main)
            if run.is_main:
                tokenizer.save(folder)
        saver.finish(steps)
        output.finish(
            f"tune generate {cfg.output_dir}/final --prompt '…'",
            *quant.commands(cfg, model, merged=True),
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
