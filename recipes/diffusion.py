"""Masked text diffusion: a decoder's weights, trained to restore hidden tokens from both sides, and samples from it.

    tune run recipes/diffusion.py --config my.yaml tokenizer.add_tokens='["<|mask|>"]' diffusion.prompts='["Once"]'
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftlib import build, data, models, optim
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.data.positions import seed_of
from ftlib.errors import UserError
from ftlib.launch import launch, script
from ftlib.layers.batch import Batch as Packed
from ftlib.loop import Boundary
from ftlib.losses.diffusion import MASK, diffusion_loss, hide, sample
from ftlib.observe.output import Output
from ftlib.observe.said import Said
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.sections import (
    Batch,
    Checkpoint,
    Diffusion,
    Eval,
    Log,
    Memory,
    Model,
    Optim,
    Parallel,
    Schedule,
    Texts,
    Tokenizer,
)
from ftlib.tokenizers import Tokenizer as Reader


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    from_scratch: bool = True  # draw fresh weights: of the model only config.json is read; false: continue its weights
    diffusion: Diffusion = Diffusion()
    tokenizer: Tokenizer = Tokenizer()
    data: Texts
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    optim: Optim = Optim(lr=1e-3, weight_decay=0.1)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # initial weights, order of the data, which tokens are hidden
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, optimizer state and arithmetic
    deterministic: bool = False  # equal runs give equal bits on a GPU too, at some cost
    output_dir: OutputDir = Path("output/diffusion")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def check(cfg: Config, world: int = 1) -> None:
    """What can be known before anything is loaded."""
    build.check(cfg, world, scores=["eval_loss"])
    mask_of(cfg, build.tokenizer(cfg))
    if cfg.parallel.cp * cfg.parallel.tp > 1:
        what = "restoring tokens needs whole rows and whole heads on each process"
        raise UserError(what, where="parallel.cp, parallel.tp", fix="set both to 1")
    if cfg.eval.prompts or cfg.eval.exact_match:
        what = "an evaluation here is a bound of the loss, and nothing is restored in it"
        fix = "leave them out; diffusion.prompts are continued when the run is over"
        raise UserError(what, where="eval.prompts, eval.exact_match", fix=fix)


def mask_of(cfg: Config, tokenizer: Reader) -> int:
    """The id of the mask token."""
    name = cfg.diffusion.mask_token
    if name not in tokenizer.special_tokens:
        fix = f"name another, or add it: tokenizer.add_tokens='[\"{name}\"]'"
        raise UserError(f"the tokenizer has no token {name!r}", where="diffusion.mask_token", fix=fix)
    return tokenizer.special_tokens[name]


class HeldOut:
    """`eval_loss` of held-out rows, in nats for each trained token; the same tokens are hidden at every evaluation."""

    def __init__(self, cfg: Config, rows: data.Datasets, tokenizer: Reader, run: processes.Run, most: int) -> None:
        self.cfg, self.sets, self.run = cfg, list(rows.eval.values()), run
        self.mask, pad = mask_of(cfg, tokenizer), tokenizer.pad_id or 0
        self.shape = (cfg.data.seq_len, cfg.batch.micro_rows, pad, run.data_rank, run.data_ranks, most)

    @torch.no_grad()
    def __call__(self, model: models.LanguageModel) -> dict[str, float]:
        """One evaluation; every process must call it."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        batches = [batch for rows in self.sets for batch in data.eval_batches(rows, *self.shape)]
        for number, batch in enumerate(batches):
            first = (number * self.run.data_ranks + self.run.data_rank) * self.cfg.batch.micro_rows
            total += bound(self.cfg, model, batch, self.mask, self.run, 0, first)
        model.train()
        targets = sum(rows.target_weights.sum().item() for rows in self.sets)
        return {"eval_loss": self.run.total(total).item() / targets} if targets else {}

    def samples(self) -> list[Said]:
        """None: a sample takes as long as many steps."""
        return []


def bound(
    cfg: Config, model: models.LanguageModel, batch: Packed, mask: int, run: processes.Run, step: int, first: int
) -> torch.Tensor:
    """Sum of weighted -log p over the hidden tokens of a batch, whose rows are `first` and following of the step."""
    seeds = [seed_of(cfg.seed, step, first + row) for row in range(len(batch.input_ids))]
    noised = hide(batch, mask, cfg.diffusion.least, seeds, cfg.data.seq_len)
    micro, weights = noised.batch.to(run.device), noised.weights.to(run.device)
    terms = {"targets": micro.target_tokens, **model.logit_terms}
    return diffusion_loss(model(micro), model.lm_head.weight, micro.labels, weights, **terms)


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save, sample; returns the rows of metrics.jsonl."""
    check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    mask = mask_of(cfg, tokenizer)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    model = build.model(cfg, run)
    optimizer = optim.build(model, cfg.optim)
    evaluate = HeldOut(cfg, rows, tokenizer, run, loader.max_documents)

    output = Output(cfg, run, model, steps)
    state = State(model, optimizer, loader, extra=output.counters)
    fingerprint = build.fingerprint(cfg, rows) | {"diffusion": [cfg.diffusion.mask_token, cfg.diffusion.least]}
    saver = Saver(cfg.checkpoint, cfg.output_dir, run, fingerprint, output.say)
    if saver.finished() == steps:
        return output.already_finished()
    done = saver.resume(state)

    with output.begin(done, rows.report.lines()), Boundary(cfg, run, steps, evaluate, output, saver, state) as boundary:
        if done == 0:
            boundary.score(0)

        for step in range(done + 1, steps + 1):
            with output.waiting():
                batch = next(loader)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            loss = torch.zeros((), dtype=torch.float64, device=run.device)
            first = run.data_rank * len(batch.micro_batches) * cfg.batch.micro_rows
            for i, micro in enumerate(batch.micro_batches):
                part = bound(cfg, model, micro, mask, run, step, first + i * cfg.batch.micro_rows) / batch.target_weight
                part.backward()
                loss += part.detach()
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens)
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        with final_folder(run, cfg.output_dir) as folder:
            models.save_pretrained(model, folder, write=run.is_main, about={MASK: cfg.diffusion.mask_token})
            if run.is_main:
                tokenizer.save(folder)
        saver.finish(steps)
        how = cfg.diffusion
        options = {"steps": how.steps, "block": how.block, "temperature": how.temperature, "seed": cfg.seed}
        for prompt in how.prompts:
            (ids,) = sample(model.eval(), [tokenizer.encode(prompt)], how.length, mask, **options)
            output.say(f"  {prompt!r} -> {tokenizer.decode(ids, skip_special=True)!r}")
        output.finish(
            f"tune generate {cfg.output_dir}/final --raw --prompt '…' --max-new-tokens {how.length}",
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
