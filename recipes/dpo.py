"""Learning from preferences: DPO and its family, with low-rank adapters or (lora: null) on every weight.

    tune run recipes/dpo.py --config configs/demo_dpo.yaml dpo.loss=simpo
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftlib import build, models, optim
from ftlib.adapters import result
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.data import AnswerBatch
from ftlib.launch import launch, script
from ftlib.loop import Boundary
from ftlib.observe.output import Output, trained_share
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.preference import reference
from ftlib.preference.answers import answer_logprobs, policy_weights
from ftlib.preference.evaluation import PreferenceEvaluation
from ftlib.preference.objective import FIGURES, Objective, figures, resolve, running_mean
from ftlib.sections import (
    Batch,
    Checkpoint,
    Data,
    Dpo,
    Eval,
    Log,
    Lora,
    Memory,
    Model,
    Optim,
    Parallel,
    Schedule,
    Tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    dpo: Dpo = Dpo()
    lora: Lora | None = Lora()  # null: every weight trains, at a learning rate of about 5e-7
    data: Data
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    optim: Optim = Optim(lr=5e-6)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # order of the data, initial adapters
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights and the arithmetic; adapters and log-probs are fp32
    deterministic: bool = False  # equal runs give equal bits on a GPU too, at some cost
    profile: bool = False  # trace three steps: where their time and memory go
    output_dir: OutputDir = Path("output/dpo")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def backward(
    model: models.LanguageModel,
    micro_batches: list[AnswerBatch],
    objective: Objective,
    reference_logprobs: reference.Reference,
    baseline: torch.Tensor | float,
    units: int,
    run: processes.Run,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of this process's part of a step; its part of the loss, and sums for the log."""
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    sums = torch.zeros(len(FIGURES), 2, dtype=torch.float64, device=run.device)
    for micro in micro_batches:
        micro = micro.to(run.device, non_blocking=True)
        before = reference_logprobs(model, micro)  # of each answer; None where the loss has no reference
        hidden, head, terms = model(micro), model.lm_head.weight, model.logit_terms
        policy = answer_logprobs(hidden, head, micro.answers, length_alpha=objective.length_alpha, **terms)
        weights = policy_weights(hidden, head, micro.answers, **terms) if objective.on_policy else None  # wpo
        values, counted = objective(micro.answers, policy, before, baseline, weights)
        # Each micro-batch on each device adds its part of one mean over the step's pairs, or rated answers.
        part = values.sum() / units
        part.backward()
        loss += part.detach()
        sums += counted
    return loss, sums


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save; returns the rows of metrics.jsonl."""
    build.check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)
    objective = resolve(cfg.dpo)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    model = build.model(cfg, run, reference=True)
    optimizer = optim.build(model, cfg.optim)
    output = Output(cfg, run, model, steps)
    saver = Saver(cfg.checkpoint, cfg.output_dir, run, build.fingerprint(cfg, rows), output.say)
    if saver.finished() == steps:
        return output.already_finished()
    references = reference.make(cfg, objective, rows, model, run, saver.fingerprint)  # while the model is it
    evaluate = PreferenceEvaluation(cfg, rows, objective, references, run, output.counters, loader.max_documents)
    state = State(model, optimizer, loader, extra=output.counters)
    done = saver.resume(state)

    with output.begin(done, rows.report.lines()), Boundary(cfg, run, steps, evaluate, output, saver, state) as boundary:
        output.say(f"loss: {objective.formula}")
        output.say(f"reference: {reference.kind(cfg, objective)}; {trained_share(model)}")
        if done == 0:
            boundary.score(0)

        for step in range(done + 1, steps + 1):
            with output.waiting():
                batch = next(loader)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            units = sum(map(len, batch.packs))  # pairs, or rated answers, of the step over all devices
            baseline = output.counters.get("mean_reward", 0.0) if objective.shifted else 0.0  # bco: of all steps so far
            if objective.mismatched:  # kto: of answers to other prompts, in this step
                baseline = reference.divergence(model, batch.micro_batches, references["train"], objective, run)
            loss, sums = backward(model, batch.micro_batches, objective, references["train"], baseline, units, run)
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            sums = run.total(sums)
            if objective.shifted:
                running_mean(output.counters, sums)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens, figures(sums))
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        with final_folder(run, cfg.output_dir) as folder:
            if cfg.lora is not None:
                result.save(model, folder, cfg.model.path, write=run.is_main)
            else:
                models.save_pretrained(model, folder, write=run.is_main)
            if run.is_main:
                tokenizer.save(folder)
        saver.finish(steps)
        output.finish(
            f"tune generate {cfg.output_dir}/final --prompt '…'",
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
