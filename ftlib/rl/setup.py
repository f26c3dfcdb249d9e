"""From a config to the parts of a reinforcement-learning run, and what is known to be wrong before any is made."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftlib import build
from ftlib.adapters import lora
from ftlib.adapters import setup as adapters
from ftlib.checkpoint.agree import exchange
from ftlib.data import prompts as asked
from ftlib.data.examples import shown
from ftlib.data.report import counted
from ftlib.errors import Problems, UserError
from ftlib.kernels.linear_logprobs import linear_logprobs
from ftlib.models import LanguageModel, own
from ftlib.parallel.run import Run, sizes
from ftlib.rl import ahead, by_vllm, environments, evaluation, presets, reward_model
from ftlib.rl.presets import Resolved, resolve
from ftlib.rl.rewards import run as rewards
from ftlib.rl.samples import Micro, Sample, idle, log_probabilities, pack
from ftlib.sections import Train
from ftlib.sections.rl import Reward
from ftlib.tokenizers import Tokenizer

COMPARES = ("gsm8k", "maths", "exact", "contains")  # rewards, with the column `answer`


def check(cfg: Any, world: int = 1) -> list[str]:
    """Everything about a run that can be known without loading weights; raises one error with all problems, and returns
    what a run would say of its prompts."""
    problems: list[str] = []
    said: list[str] = []
    known = partial(build.check, cfg, world, evaluation.scores(cfg))
    for part in (known, lambda: _check_algorithm(cfg, world), lambda: _check_data(cfg, said)):
        try:
            part()
        except UserError as error:
            problems += error.problems if isinstance(error, Problems) else [str(error)]
    if problems:
        raise Problems(dict.fromkeys(problems))
    return said


def load_prompts(cfg: Any, tokenizer: Tokenizer) -> asked.PromptSets:
    """Training and held-out prompts of a config."""
    tools = environments.schemas(cfg.dialogue)
    several = bool(cfg.dialogue.tools or cfg.dialogue.environment)
    sets = asked.load(cfg.data, tokenizer, cfg.rollout.max_new_tokens, cfg.seed, tools, several)
    sets.report += environments.hidden(next(p for source in sets.train.sources for p in source), tokenizer)
    epoch = round(asked.PromptLoader(sets.train, 1, cfg.seed).steps_per_epoch())
    if cfg.rollout.prompts > epoch:
        what = f"rollout.prompts is {cfg.rollout.prompts}, and an epoch has {counted(epoch, 'prompt')}"
        sets.report.append(f"warning: {what}: a step asks the same ones several times, as groups of their own")
    longest = max(len(p.ids) for source in sets.train.sources for p in source) + cfg.rollout.max_new_tokens
    most = own.arch(cfg.model, cfg.model.path).max_positions
    if most and longest > most:
        what = f"a prompt and its completion may have {longest:,} tokens, and the model's range is {most:,}"
        sets.report.append(f"warning: {what} (max_position_embeddings): lower rollout.max_new_tokens")
    return sets


def fingerprint(cfg: Any, sets: asked.PromptSets) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    found = build.fingerprint(cfg, sets)
    return found | {"rollout.prompts": cfg.rollout.prompts, "rollout.group": cfg.rollout.group}


class Reference:
    """The policy that the trained one is held to: `with reference.switched(): reference.model(batch)`.

    Beside adapters it is the base, or the adapter the run started from, with the same weights in memory once. A full
    fine-tune and a teacher are models of their own, frozen.
    """

    def __init__(self, cfg: Any, policy: LanguageModel, algorithm: Resolved, run: Run) -> None:
        self.exists = algorithm.needs_reference
        self._policy, self._cfg = policy, cfg
        self._own: LanguageModel | None = None
        if algorithm.advantage == "teacher":
            self._own = build.frozen(cfg, run, cfg.teacher.path)
        elif self.exists and cfg.lora is None:
            self._own = build.frozen(cfg, run, cfg.model.path)

    def switched(self) -> AbstractContextManager[None]:
        """Within the block `self.model` computes as the reference."""
        if self._own is not None:
            return nullcontext()
        return lora.use(self._policy, adapters.reference_name(self._cfg.lora))

    @property
    def model(self) -> LanguageModel:
        return self._own if self._own is not None else self._policy


def fill_gradients(model: LanguageModel, run: Run) -> None:
    """Zeros where this process had no samples to learn from, as gradients are summed with the others' in every step."""
    if run.data_ranks > 1:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def score_tokens(model: LanguageModel, micro: Micro, temperature: float, entropy: bool = False) -> Any:
    """Log-probabilities of a micro-batch's drawn tokens at `temperature`, float32 [n], with `entropy` theirs too.

    Differentiable; the logits of all tokens never exist at once.
    """
    batch = micro.batch
    found = linear_logprobs(
        model(batch).flatten(0, 1),
        model.lm_head.weight,
        batch.labels.flatten(),
        targets=batch.target_tokens,
        temperature=temperature,
        entropy=entropy,
        **model.logit_terms,
    )
    return tuple(value[micro.at] for value in found) if entropy else found[micro.at]


def micro_batches(cfg: Any, samples: Sequence[Sample], pad_id: int, run: Run) -> list[Micro]:
    """The samples packed, on the device. Processes that share a model compute together: they have as many, the last of
    them idle where there is less to do. Collective."""
    shape = cfg.data.seq_len, cfg.batch.micro_rows, pad_id
    micros = pack(samples, *shape)
    if shared(run):
        micros += [idle(*shape) for _ in range(max(exchange(run, len(micros))) - len(micros))]
    return [micro.to(run.device) for micro in micros]


def shared(run: Run) -> bool:
    """Whether a copy of the model lies on several processes."""
    return run.dense["fsdp"].size() > 1


@torch.no_grad()
def look_back(
    cfg: Any, samples: Sequence[Sample], policy: LanguageModel, reference: Reference, pad_id: int, run: Run
) -> None:
    """Fill `old` (when it is needed) and `ref` (when there is one) of every sample, before the first update on them.

    Completions of older weights are compared with the probabilities that they were drawn with.
    """
    micros = micro_batches(cfg, samples, pad_id, run)

    def of(model: LanguageModel) -> Callable[[Micro], Tensor]:
        return lambda micro: score_tokens(model, micro, cfg.rollout.temperature)

    if cfg.rollout.staleness:
        for sample in samples:
            sample.old = sample.engine
    elif cfg.rollout.minibatches > 1 or resolve(cfg.algorithm).token_advantages:
        for sample, values in zip(samples, log_probabilities(samples, micros, of(policy)), strict=True):
            sample.old = values
    if reference.exists:
        with reference.switched():
            found = log_probabilities(samples, micros, of(reference.model))
        for sample, values in zip(samples, found, strict=True):
            sample.ref = values


def _check_algorithm(cfg: Any, world: int) -> None:
    algorithm, problems = resolve(cfg.algorithm), []

    def wrong(what: str, where: str, fix: str) -> None:
        problems.append(str(UserError(what, where=where, fix=fix)))

    if cfg.rollout.max_new_tokens >= cfg.data.seq_len:
        wrong(
            f"rollout.max_new_tokens {cfg.rollout.max_new_tokens} leaves no room for a prompt in data.seq_len "
            f"{cfg.data.seq_len}", "data.seq_len", "raise data.seq_len or lower rollout.max_new_tokens",
        )  # fmt: skip
    for unread in presets.unread(cfg.algorithm):
        wrong(*unread)
    taught = algorithm.advantage == "teacher"
    if taught and cfg.teacher.path is None:
        wrong("this algorithm learns from a teacher", "teacher.path", "name its folder or Hub id")
    if cfg.teacher.path is not None and not taught:
        wrong("no part of this algorithm looks at a teacher", "teacher.path", "set algorithm.preset=distill")
    if not taught and not cfg.rewards:
        wrong("nothing says how good a completion is", "rewards", "name at least one: rewards=[{fn: gsm8k}]")
    replicate, shard, *others = sizes(cfg.parallel, world)
    if cfg.rollout.prompts % (replicate * shard):
        what = f"rollout.prompts {cfg.rollout.prompts} is no multiple of the {replicate * shard} processes that draw"
        wrong(what, "rollout.prompts", f"set it to a multiple of {replicate * shard}")
    compares = algorithm.advantage not in ("whiten", "teacher")
    if cfg.rollout.group == 1 and compares:
        fix = "raise it, or take algorithm.preset=reinforce++"
        wrong("completions are compared with others of their prompt, and there are none", "rollout.group", fix)
    if cfg.rewards and not any(reward.weight for reward in cfg.rewards) and algorithm.overlong != "soft":
        keys = ", ".join(f"rewards[{i}].weight" for i in range(len(cfg.rewards)))
        wrong("every reward counts 0 times, so there is nothing to learn", keys, "give one another weight, such as 1")
    if algorithm.advantage == "gdpo" and len(cfg.rewards) < 2:
        wrong("gdpo sets several rewards on one scale", "rewards", "name two or more, or take algorithm.preset=grpo")
    if cfg.rollout.staleness:
        problems += ahead.problems(cfg, world)
    if cfg.rollout.engine == "vllm":
        problems += by_vllm.problems(cfg, world)
    if algorithm.dynamic_sampling and taught:
        wrong("a teacher leaves no groups to choose from", "algorithm.dynamic_sampling", "leave it out")
    if algorithm.kl_in == "reward" and algorithm.kl_coef and algorithm.advantage != "whiten":
        fix = "take kl_in=loss, or advantage=whiten"
        wrong("a divergence inside of the reward is credited token by token", "algorithm.kl_in", fix)
    if cfg.lora is not None and cfg.lora.dropout:
        fix = "set it to 0: completions come from the model without it"
        wrong("dropout changes the probabilities that are compared", "lora.dropout", fix)
    if cfg.lora is not None and cfg.train != Train():
        wrong("adapters train here, not the model", "train", "leave out the train section, or lora")
    if max(others) > 1:
        wrong("each process draws completions with a whole model", "parallel.cp, parallel.tp", "set both to 1")
    whole = f"set parallel.dp_replicate={world} and parallel.dp_shard=1"
    if shard > 1 and cfg.model.quantize:
        wrong("quantized matrices are not gathered for drawing", "model.quantize, parallel.dp_shard", whole)
    if shard > 1 and cfg.model.fp8 and cfg.lora is not None:
        what = "below adapters, model.fp8 keeps weights in 8 bits, which are not gathered for drawing"
        wrong(what, "model.fp8, parallel.dp_shard", whole)
    if shard > 1 and any(reward.model for reward in cfg.rewards):
        wrong("processes that share a model would have to score together", "rewards, parallel.dp_shard", whole)
    if problems:
        raise Problems(problems)


def _check_data(cfg: Any, said: list[str]) -> None:
    environments.check(cfg.dialogue)
    sets = load_prompts(cfg, build.tokenizer(cfg))
    said += sets.report
    rewards.check(cfg.rewards, sets.columns)
    _check_answers(cfg.rewards, [*(prompt for source in sets.train.sources for prompt in source), *sets.eval])
    reward_model.check(cfg)


def _check_answers(cfg: Sequence[Reward], prompts: Sequence[asked.Prompt]) -> None:
    """UserError where a built-in reward would compare completions with a list, written as text."""
    readers = [f"rewards[{i}].fn" for i, reward in enumerate(cfg) if reward.fn in COMPARES]
    odd = [prompt for prompt in prompts if isinstance(prompt.columns.get("answer"), list | dict)]
    if readers and odd:
        what = f"column 'answer' must be text or a number, here it is {shown(odd[0].columns['answer'])}"
        fix = "write one answer as text; several right ones take a function of yours: rewards=[{fn: ./mine.py:f}]"
        where = f"{odd[0].where}, {len(odd):,} of {len(prompts):,} prompts ({', '.join(readers)})"
        raise UserError(what, where=where, fix=fix)
