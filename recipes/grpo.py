"""Reinforcement learning: completions are drawn, scored, compared with others of their prompt, and learned from.

    tune run recipes/grpo.py --config configs/demo_grpo.yaml algorithm.preset=dr_grpo
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftlib import build, models, optim, tokenizers
from ftlib.adapters import result
from ftlib.checkpoint import Saver, State
from ftlib.checkpoint.final import final_folder
from ftlib.config import OutputDir
from ftlib.data.prompts import PromptLoader
from ftlib.generation import Engine
from ftlib.generation.vllm import VllmEngine
from ftlib.launch import launch, script
from ftlib.loop import Boundary
from ftlib.losses.policy import policy_loss
from ftlib.models import LanguageModel
from ftlib.observe.output import Output, trained_share
from ftlib.optim.schedule import learning_rate
from ftlib.parallel import run as processes
from ftlib.parallel.run import Run
from ftlib.rl import ahead, presets, reward_model, scoring, setup
from ftlib.rl.ahead import Ahead
from ftlib.rl.environments import Dialogues
from ftlib.rl.evaluation import Held
from ftlib.rl.log import StepLog, step_row
from ftlib.rl.pages import Pages
from ftlib.rl.rewards.run import Rewards
from ftlib.rl.rollouts import Rollouts
from ftlib.rl.samples import Sample
from ftlib.sections import Checkpoint, Log, Lora, Memory, Model, Optim, Parallel, Schedule, Tokenizer, Train
from ftlib.sections.rl import Algorithm, Dialogue, Greedy, MicroBatch, Prompts, Reward, Rollout, Teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    lora: Lora | None = None  # null: every weight trains that `train` leaves
    train: Train = Train()
    data: Prompts
    rewards: tuple[Reward, ...] = ()  # what completions earn
    algorithm: Algorithm = Algorithm()
    rollout: Rollout = Rollout()
    dialogue: Dialogue = Dialogue()
    teacher: Teacher = Teacher()
    batch: MicroBatch = MicroBatch()
    steps: int | None = None  # sets of completions; wins over epochs
    epochs: float = 1.0  # passes over the prompts
    optim: Optim = Optim(lr=1e-6, spike="ignore")
    schedule: Schedule = Schedule(name="constant", warmup_steps=0)
    eval: Greedy = Greedy()
    memory: Memory = Memory()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    seed: int = 0  # order of the prompts, completions, initial adapters
    dtype: Literal["bf16", "fp32"] = "bf16"  # of frozen weights and arithmetic; adapters are kept in fp32
    deterministic: bool = False  # equal runs give equal bits on a GPU too, at some cost
    profile: bool = False  # trace three steps: where their time and memory go
    output_dir: OutputDir = Path("output/grpo")  # config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ and final/


def check(cfg: Config, world: int = 1) -> list[str]:
    """What `tune validate` runs and says, and `main` before anything is loaded."""
    return setup.check(cfg, world)


def make_engine(cfg: Config, model: LanguageModel, run: Run) -> Engine | VllmEngine:
    """What draws completions: with the trainer's own weights, with a whole copy where processes share them, or vLLM."""
    if cfg.rollout.engine == "vllm":
        return VllmEngine(model, cfg.rollout, longest=cfg.data.seq_len, dtype=cfg.dtype)
    return Engine(model, max_batch=cfg.rollout.max_batch, adapter="gathered" if setup.shared(run) else "live")


def draw(
    cfg: Config, step: int, prompts: PromptLoader, rollouts: Rollouts | Ahead, rewards: Rewards, run: Run, note: StepLog
) -> tuple[list[Sample], list[Sample]]:
    """(samples to learn from, all samples). With dynamic sampling, groups that all earn the same are replaced."""
    algorithm = presets.resolve(cfg.algorithm)
    share = cfg.rollout.prompts // run.data_ranks  # prompts of each process
    own = slice(run.data_rank * share, (run.data_rank + 1) * share)
    kept: list[Sample] = []
    drawn: list[Sample] = []
    for number in range(cfg.rollout.max_rounds if algorithm.dynamic_sampling else 1):
        with note.clock("generate"):
            fresh = rollouts(next(prompts)[own], cfg.rollout.group, (cfg.seed, step, number, run.data_rank))
        with note.clock("reward"):
            scoring.give_rewards(fresh, rewards, algorithm, cfg.rollout.max_new_tokens)
        for sample in fresh:
            sample.group += number * share  # prompts of later rounds are further groups
        drawn += fresh
        kept += scoring.differing(fresh, rewards, algorithm.advantage) if algorithm.dynamic_sampling else fresh
        note.staleness = rollouts.age
        if scoring.enough(kept, cfg.rollout.group * share, run):
            break
    # With rollout.staleness another process draws for the next step while this one learns; else nothing begins.
    rollouts.begin(prompts.peek()[own], cfg.rollout.group, (cfg.seed, step + 1, 0, run.data_rank))
    return kept[: cfg.rollout.group * share], drawn


def learn(
    cfg: Config, samples: list[Sample], model: LanguageModel, optimizer: Optimizer, pad_id: int, run: Run,
    note: StepLog, pages: Pages,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One optimizer step for each mini-batch of the samples: (loss over all processes, last gradient norm)."""
    algorithm = presets.resolve(cfg.algorithm)
    loss, grad_norm = torch.zeros((), device=run.device), torch.zeros(())
    for number, part in enumerate(scoring.split(samples, cfg.rollout.minibatches)):
        # Each token's weight holds the one denominator of this optimizer step, over all micro-batches of all processes.
        trained, tokens = scoring.give_weights(part, algorithm, cfg.rollout.max_new_tokens, run)
        for micro in setup.micro_batches(cfg, trained, pad_id, run):
            new, entropy = setup.score_tokens(model, micro, cfg.rollout.temperature, entropy=True)
            part_loss, logs = policy_loss(new, micro.tokens, algorithm.objective)
            part_loss.backward()
            loss += part_loss.detach()
            if micro.samples:
                note.tokens(micro, new.detach(), entropy, logs, first=number == 0)
        if number == 0:
            pages.check(note, run)  # that the trainer gives what was drawn the engine's probabilities
        if pages.learns(tokens):  # else every group earned the same, on every process
            setup.fill_gradients(model, run)
            grad_norm = optim.step(optimizer, cfg.optim.max_grad_norm)
    return run.total(loss), grad_norm


def main(cfg: Config) -> list[dict]:
    """Draw, score, learn, save; returns the rows of metrics.jsonl."""
    check(cfg, processes.world_size())
    run = processes.start(cfg.parallel, cfg.seed, cfg.deterministic)

    tokenizer = build.tokenizer(cfg)
    sets = setup.load_prompts(cfg, tokenizer)
    prompts = PromptLoader(sets.train, cfg.rollout.prompts, cfg.seed)
    steps = cfg.steps or max(1, round(cfg.epochs * prompts.steps_per_epoch()))
    algorithm = presets.resolve(cfg.algorithm)
    model = build.model(cfg, run, reference=algorithm.needs_reference)
    reference = setup.Reference(cfg, model, algorithm, run)
    optimizer = optim.build(model, cfg.optim)

    output = Output(cfg, run, model, steps)
    rewards = Rewards(cfg.rewards, output.say, reward_model.load_all(cfg, run))
    dialogues = Dialogues(cfg.dialogue, output.say)
    state = State(model, optimizer, prompts, extra=output.counters)
    saver = Saver(cfg.checkpoint, cfg.output_dir, run, setup.fingerprint(cfg, sets), output.say)
    if saver.finished() == steps:
        return output.already_finished()
    done = saver.resume(state)
    engine = make_engine(cfg, model, run)
    rollouts = Rollouts(cfg.rollout, engine, tokenizer, dialogues)
    evaluate = Held(cfg.eval, sets.eval, rollouts, rewards, algorithm, run)
    drawing = ahead.rollouts(cfg, rollouts, model, output.counters, run)
    pages = Pages(cfg, run, output, done)
    boundary = Boundary(cfg, run, steps, evaluate, output, saver, state)
    said = [*sets.report, f"training: {trained_share(model)}", *presets.formula(cfg.algorithm, cfg.rollout)]
    with rewards, dialogues, drawing, output.begin(done, said), boundary:
        if done == 0:
            boundary.score(0)
        for step in range(done + 1, steps + 1):
            note = StepLog()
            with note.clock("sync"):  # a copy may be as old as the last update, or the average that was evaluated
                engine.refresh()
            samples, drawn = draw(cfg, step, prompts, drawing, rewards, run, note)
            engine.release()  # the update has the memory of keys and values
            with note.clock("logprobs"):  # of the policy before the update and of the reference, where they are needed
                setup.look_back(cfg, samples, model, reference, tokenizer.filler_id, run)
            scoring.give_advantages(samples, scoring.gather(samples, rewards, run), algorithm, run)
            lr = optim.set_rate(optimizer, learning_rate(cfg.schedule, cfg.optim.lr, step, steps))
            with note.clock("train"):
                loss, grad_norm = learn(cfg, samples, model, optimizer, tokenizer.filler_id, run, note, pages)
            with note.clock("sync"):
                drawing.settle()
            tokens, row = step_row(note, drawn, rewards, algorithm, reference.exists, run)
            output.step(step, loss, grad_norm, lr, tokens, row)
            pages.write(step, drawn, rewards.names, row)
            if boundary(step):  # evaluates, saves and stops when it is time to
                break

        boundary.finish()
        save(cfg, model, tokenizer, run)
        saver.finish(steps)
        output.finish(
            f"tune generate {cfg.output_dir}/final --prompt '…'",
            f"tune run {script(__file__)} --config {cfg.output_dir}/config.yaml steps={2 * steps}",
        )
    return output.rows()


def save(cfg: Config, model: LanguageModel, tokenizer: tokenizers.Tokenizer, run: Run) -> None:
    """`final/`: a model in Hugging Face's layout, or an adapter in PEFT's."""
    with final_folder(run, cfg.output_dir) as folder:
        if cfg.lora is None:
            models.save_pretrained(model, folder, write=run.is_main)
        else:
            result.save(model, folder, cfg.model.path, write=run.is_main)
        if run.is_main:
            tokenizer.save(folder)


if __name__ == "__main__":
    launch(Config, main)
