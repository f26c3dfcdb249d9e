"""Pretraining: a model from scratch or continued, on text that is read before it or while it trains.

    tune run recipes/pretrain.py --config configs/demo_pretrain.yaml steps=200
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from ftlib import build, models, optim, preflight
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.data import Step
from ftlib.data.positions import seed_of, skip_positions
from ftlib.data.streaming import StreamStep
from ftlib.errors import UserError, about
from ftlib.evaluation.evaluate import Evaluation
from ftlib.launch import launch, script
from ftlib.layers.batch import Batch as Packed
from ftlib.loop import Boundary
from ftlib.losses.balancing import Balance
from ftlib.losses.language_modelling import next_token_loss
from ftlib.losses.multi_token import MultiToken
from ftlib.models import hub, own, sizes
from ftlib.observe.output import Output, trained_share
from ftlib.observe.statistics import statistics
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.sections import (
    Batch,
    Checkpoint,
    Context,
    Eval,
    Init,
    Log,
    Loss,
    Memory,
    Model,
    Mtp,
    Optim,
    Parallel,
    Schedule,
    Sizes,
    Stream,
    Texts,
    Tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    from_scratch: bool = True  # draw fresh weights: of the model only config.json is read; false: continue its weights
    sizes: Sizes = Sizes()
    init: Init = Init()
    context: Context = Context()
    tokenizer: Tokenizer = Tokenizer()
    data: Texts
    stream: Stream | None = None  # read the sources while training; null: read and tokenise them before
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    loss: Loss = Loss()
    mtp: Mtp = Mtp()
    optim: Optim = Optim(lr=3e-3, weight_decay=0.1)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # initial weights, order of the data
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, optimizer state and arithmetic
    deterministic: bool | Literal["elastic"] = False  # equal bits in equal runs; elastic: and on any dp_replicate
    profile: bool = False  # trace three steps: where their time and memory go
    output_dir: OutputDir = Path("output/pretrain")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def shaped(cfg: Config, below: Path | None = None) -> Config:
    """The same config on a model folder with the sizes and range asked for, made in output_dir, or elsewhere `below`;
    the tokenizer stays where it was."""
    if not (cfg.sizes.changed or cfg.context.changed):
        return cfg
    fresh = [key for key, on in {"sizes": cfg.sizes.changed, "context.ssmax": cfg.context.ssmax}.items() if on]
    if fresh and not cfg.from_scratch:
        fix = f"set from_scratch=true, or leave out what is for fresh weights: ~{' ~'.join(fresh)}"
        raise UserError("weights have the sizes and the attention they have", where=", ".join(fresh), fix=fix)
    with about("model.path"):
        source = hub.resolve(cfg.model.path)
    with about("model.code"):
        code = own.find(cfg.model.code)
    with about("output_dir"):
        preflight.check_folder(cfg.output_dir)
        folder = sizes.write(source, below or cfg.output_dir, cfg.sizes, cfg.context, not cfg.from_scratch, code)
    tokenizer = replace(cfg.tokenizer, path=cfg.tokenizer.path or cfg.model.path)
    return replace(cfg, model=replace(cfg.model, path=str(folder)), tokenizer=tokenizer)


def skipped(cfg: Config, run: processes.Run, micro: Packed, length: int, step: int, number: int) -> Packed:
    """A micro batch with positions that skip, drawn by each row's place in the step: the same on all meshes."""
    first = run.data_rank * cfg.batch.rows // run.data_ranks + number * cfg.batch.micro_rows
    seeds = [seed_of(cfg.seed, step, first + row) for row in range(cfg.batch.micro_rows)]
    return skip_positions(micro, length, seeds, cfg.data.seq_len)


def columns(cfg: Config, model: models.LanguageModel, batch: Step | StreamStep, step: int) -> dict[str, float]:
    """What rows of metrics.jsonl have here beside the usual: norms by kind of parameter, tokens of each source."""
    more = statistics(model) if cfg.log.statistics and step % cfg.log.statistics == 0 else {}
    if isinstance(batch, StreamStep):
        more |= {f"tokens/{name}": count for name, count in batch.by_source.items()}
    return more


def whence(cfg: Config, done: int) -> str:
    """Where the weights come from that a run begins or goes on with."""
    return f"step {done:,}'s" if done else "fresh" if cfg.from_scratch else "loaded"


def check(cfg: Config, world: int = 1) -> None:
    """What can be known before anything is loaded."""
    with TemporaryDirectory() as scratch:
        build.check(shaped(cfg, Path(scratch)), world)
    copies, shards, cp, _ = processes.sizes(cfg.parallel, world)
    elastic = cfg.deterministic == "elastic"
    if cfg.log.statistics and (elastic or (copies > 1 and shards * cp == 1)):
        where, other = ("deterministic", "true") if elastic else ("parallel.dp_replicate", "1")
        what = "gradients are summed in the optimizer's step, after they would be measured"
        raise UserError(what, where=f"log.statistics, {where}", fix=f"set log.statistics=0, or {where}={other}")


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save; returns the rows of metrics.jsonl."""
    check(cfg, processes.world_size())
    cfg = shaped(cfg)
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    model = build.model(cfg, run)
    further, balance = MultiToken(model, cfg.loss), Balance(model, cfg.loss)
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
        output.say(f"{whence(cfg, done)} weights: {trained_share(model)}")

        for step in range(done + 1, steps + 1):
            with output.waiting():
                batch = next(loader)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            loss = torch.zeros((), dtype=torch.float64, device=run.device)  # wide: sums alike in any order
            for number, micro in enumerate(batch.micro_batches):
                if cfg.context.skip:
                    micro = skipped(cfg, run, micro, model.arch.max_positions, step, number)
                micro = micro.to(run.device, non_blocking=True)
                # Each micro-batch on each device adds its part of one weighted mean over the step's target tokens.
                hidden, head, terms = model(micro), model.lm_head.weight, model.logit_terms | {"weights": micro.weights}
                part = next_token_loss(hidden, head, micro.labels, micro.target_tokens, cfg.loss, **terms)
                part = (part + further(hidden, micro) + balance(micro)) / batch.target_weight
                part.backward()
                loss += part.detach()
            more = columns(cfg, model, batch, step) | further.column(run, batch) | balance.column(run, batch)
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens, more)
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        with final_folder(run, cfg.output_dir) as folder:
            models.save_pretrained(model, folder, write=run.is_main)
            if run.is_main:
                tokenizer.save(folder)
        saver.finish(steps)
        output.finish(
            f"tune generate {cfg.output_dir}/final --raw --prompt '…'",
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
