"""Distillation: every weight of a small model learns what a larger one of the same vocabulary thinks.

    tune run recipes/distill.py --config my.yaml model.path=SMALL distill.teacher=LARGE distill.divergence=reverse_kl
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ftlib import build, data, models, optim
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.data import teacher_store
from ftlib.errors import UserError, about
from ftlib.evaluation.evaluate import Evaluation
from ftlib.launch import launch, script
from ftlib.layers.batch import Batch as Packed
from ftlib.loop import Boundary
from ftlib.losses.distillation import StoredTeacher, Teacher, distillation_loss, most_likely
from ftlib.models import own
from ftlib.observe.output import Output
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.sections import (
    Batch,
    Checkpoint,
    Data,
    Distill,
    Eval,
    Log,
    Memory,
    Model,
    Optim,
    Parallel,
    Schedule,
    Tokenizer,
    Train,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model  # the student
    distill: Distill
    tokenizer: Tokenizer = Tokenizer()
    train: Train = Train()
    data: Data
    batch: Batch = Batch()
    steps: int | None = None  # optimizer steps; wins over epochs
    epochs: float = 1.0  # passes over the data
    optim: Optim = Optim(lr=2e-5)
    schedule: Schedule = Schedule()
    eval: Eval = Eval()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # order of the data
    dtype: Literal["bf16", "fp32"] = "bf16"  # of both models' weights and the arithmetic
    deterministic: bool = False  # equal runs give equal bits on a GPU too, at some cost
    profile: bool = False  # trace three steps: where their time and memory go
    output_dir: OutputDir = Path("output/distill")  # config.yaml, metrics.jsonl, checkpoints/ and final/ go here


def check(cfg: Config, world: int = 1) -> None:
    """What can be known before anything is loaded: also that both models speak of the same tokens."""
    build.check(cfg, world)
    with about("distill.teacher"):
        known = [own.arch(cfg.model, path).vocab for path in (cfg.model.path, cfg.distill.teacher)]
    if known[0] != known[1]:
        what = f"the student has {known[0]:,} tokens, the teacher {known[1]:,}"
        raise UserError(what, where="model.path, distill.teacher", fix="take models with one vocabulary")
    if build.other_tokens(cfg, cfg.distill.teacher):
        what = "the teacher's tokenizer cuts text into other tokens than the student's"
        raise UserError(what, where="model.path, distill.teacher", fix="take models with one tokenizer")
    if cfg.distill.stored and cfg.distill.top_k > known[0]:
        what = f"{cfg.distill.top_k:,} tokens of a vocabulary of {known[0]:,} cannot be kept"
        raise UserError(what, where="distill.top_k", fix=f"at most {known[0]:,}; 64 is usual")
    if cfg.distill.stored:
        teacher_store.exists(cfg.distill.stored, {"teacher": cfg.distill.teacher, "top_k": cfg.distill.top_k})
    if cfg.parallel.tp > 1 or (cfg.distill.stored and cfg.parallel.cp > 1):
        where = "parallel.tp, parallel.cp"
        raise UserError("distillation needs whole heads, and stored rows whole rows", where=where, fix="set both to 1")


def teacher_of(cfg: Config, run: processes.Run, documents: data.Documents) -> Callable[[Packed, list], Teacher]:
    """A function: batch on the device, its packs -> the teacher. `stored` ones are loaded for the first run only."""
    about = {"teacher": cfg.distill.teacher, "data": documents.fingerprint, "top_k": cfg.distill.top_k}
    stored = cfg.distill.stored
    if stored is None or not teacher_store.exists(stored, about):
        teacher = build.frozen(cfg, run, cfg.distill.teacher)
        if stored is None:
            return lambda micro, packs: Teacher(*online(teacher, micro), **teacher.logit_terms)
        if run.world > 1:
            fix = "run once with one process, which makes it"
            raise UserError(f"{stored} does not hold the teacher's tokens yet", where="distill.stored", fix=fix)
        top = lambda micro: most_likely(teacher, micro.to(run.device), cfg.distill.top_k)  # noqa: E731
        teacher_store.make(stored, documents, about, top, cfg.distill.top_k, cfg.data.seq_len)
    rows = teacher_store.TeacherStore(stored, documents)
    return lambda m, packs: StoredTeacher(*(part.to(run.device) for part in rows.rows(packs, m.input_ids.shape[1])))


@torch.no_grad()
def online(teacher: models.LanguageModel, micro: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, D] of a batch, and the head."""
    return teacher(micro).flatten(0, 1), teacher.lm_head.weight


def main(cfg: Config) -> list[dict]:
    """Train, evaluate, save; returns the rows of metrics.jsonl."""
    check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    rows = build.datasets(cfg, tokenizer)
    loader = build.loader(cfg, rows.train, tokenizer, run)
    steps = cfg.steps or max(1, round(cfg.epochs * loader.steps_per_epoch()))

    teacher = teacher_of(cfg, run, rows.train)
    model = build.model(cfg, run)
    optimizer = optim.build(model, cfg.optim)
    evaluate = Evaluation(cfg, rows, tokenizer, run, loader.max_documents)

    output = Output(cfg, run, model, steps)
    state = State(model, optimizer, loader, extra=output.counters)
    fingerprint = build.fingerprint(cfg, rows) | {"distill.teacher": cfg.distill.teacher}
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
                micro = micro.to(run.device, non_blocking=True)
                at = first + i * cfg.batch.micro_rows
                target = teacher(micro, batch.packs[at : at + cfg.batch.micro_rows])
                hidden, labels = model(micro).flatten(0, 1), micro.labels.flatten()
                terms = {"weights": micro.weights, "targets": micro.target_tokens, **model.logit_terms}
                part = distillation_loss(hidden, model.lm_head.weight, target, labels, cfg.distill, **terms)
                part = part / batch.target_weight
                part.backward()
                loss += part.detach()
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
            output.step(step, run.total(loss), grad_norm, lr, batch.tokens)
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
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


if __name__ == "__main__":
    launch(Config, main)
