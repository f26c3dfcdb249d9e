"""Reinforcement learning: the algorithm, how completions are drawn, what they earn."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ftlib.config import LocalOrHub, MaybeFile
from ftlib.sections.data import Scalar, Source
from ftlib.sections.steps import Steps, check_steps

Preset = Literal[
    "grpo", "grpo_paper", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "gdpo", "distill"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked, and how rows of the update are laid out."""

    sources: tuple[Source, ...]  # rows with `prompt`, `messages` or `question`; other columns go to the rewards
    eval: tuple[Source, ...] | float | None = None  # held-out prompts: sources, a fraction or a number of rows
    seq_len: int = 2048  # tokens of one packed row; a prompt and its completion must fit
    template: MaybeFile | None = None  # chat template: a built-in name, a .jinja file; null: the tokenizer's own
    template_args: dict[str, Scalar] = field(default_factory=dict)  # what the template reads: {enable_thinking: false}
    system: str | None = None  # a system message for prompts that have none

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if self.seq_len < 2:
            raise ValueError("seq_len: must be at least 2")
        if isinstance(self.eval, (int, float)) and (self.eval < 0 or (self.eval > 1 and self.eval % 1)):
            raise ValueError(f"eval: {self.eval:g} is neither a share below 1 (0.05) nor a whole number of rows (200)")


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A preset, and what is to differ from it: null takes the preset's. A run prints the formula that results."""

    preset: Preset = "grpo"
    advantage: Literal[
        "group", "center", "loo", "batch", "whiten", "center_whiten", "maxrl", "opo", "gdpo", "teacher"
    ] | None = None  # what a reward is compared with
    loss: Literal["clip", "cispo", "reinforce"] | None = None
    ratio: Literal["token", "sequence"] | None = None  # of probabilities: each token's, or their mean over a sequence
    aggregation: Literal["token", "seq", "const", "group"] | None = None  # what the loss is a mean over
    clip_low: float | None = None  # a ratio below 1 - clip_low has no gradient where the advantage is negative
    clip_high: float | None = None  # a ratio above 1 + clip_high has none where it is positive
    dual_clip: float | None = None  # greatest ratio that counts where the advantage is negative; null: no limit
    ratio_cap: float | None = None  # cispo: greatest weight of a token
    kl_coef: float | None = None  # of the divergence from the model that the run started with; 0 loads no reference
    kl_in: Literal["loss", "reward"] | None = None  # reward: taken off each token's, credited to the tokens before it
    correction: Literal["none", "truncate", "mask"] | None = None  # weight for trainer and engine disagreeing
    correction_cap: float | None = None  # truncate: greatest weight; mask: outside of [1 / cap, cap] it is 0
    overlong: Literal["keep", "mask", "soft"] | None = None  # cut-off completions: as they are, left out, penalised
    overlong_margin: float | None = None  # soft: the last share of max_new_tokens, over which the penalty grows to -1
    dynamic_sampling: bool | None = None  # groups that all earn the same are replaced by other prompts

    def __post_init__(self) -> None:
        for key in ("clip_low", "clip_high", "dual_clip", "ratio_cap", "kl_coef"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"{key}: must not be negative")
        if self.clip_low is not None and self.clip_low > 1:
            raise ValueError("clip_low: at most 1, the ratio 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("dual_clip: must be above 1")
        if self.correction_cap is not None and self.correction_cap < 1:
            raise ValueError("correction_cap: must be at least 1")
        if self.overlong_margin is not None and not 0 < self.overlong_margin <= 1:
            raise ValueError("overlong_margin: must lie above 0 and at most at 1")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How completions are drawn, always from the whole distribution: no top-p, no top-k."""

    prompts: int = 64  # of one optimizer step
    group: int = 8  # completions of each prompt
    max_new_tokens: int = 1024  # of a completion: all its turns, and what answers between them
    temperature: float = 1.0
    max_batch: int = 256  # completions that the engine works on at a time
    minibatches: int = 1  # optimizer updates on one set of completions
    engine: Literal["native", "vllm"] = "native"  # vllm: experimental, by the package vllm (ftlib.generation.vllm)
    vllm_memory: float = 0.4  # share of the GPU's memory that vllm takes, its copy of the weights included
    vllm_sleep: bool = False  # vllm gives its memory back while the model learns; weights wait in host memory
    staleness: Literal[0, 1] = 0  # 1: a process on the next GPU draws for the next step while this one is learned from
    max_rounds: int = 4  # dynamic sampling: attempts to fill a step with groups that differ
    mismatch_warn: float = 0.01  # mean difference of log-probabilities between engine and trainer in the first step
    mismatch_abort: float = 0.05  # a greater one ends the run
    show: int = 4  # completions of a step that go to rollouts.jsonl
    show_every: int = 10  # steps between two tables of completions on the screen; 0: none

    def __post_init__(self) -> None:
        for key in ("prompts", "group", "max_new_tokens", "max_batch", "minibatches", "max_rounds"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: must be at least 1")
        if self.temperature <= 0:
            raise ValueError("temperature: must be above 0, greedy completions of one prompt are all alike")
        if self.minibatches > self.prompts:
            raise ValueError("minibatches: each needs a prompt, so at most `prompts`")
        if not 0 < self.vllm_memory < 1:
            raise ValueError("vllm_memory: a share above 0 and below 1")
        if self.engine == "native" and (self.vllm_sleep or self.vllm_memory != Rollout.vllm_memory):
            raise ValueError("vllm_memory, vllm_sleep: only with engine: vllm")
        if min(self.show, self.show_every, self.mismatch_warn, self.mismatch_abort) < 0:
            raise ValueError("show, show_every, mismatch_warn, mismatch_abort: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A function, run in a process of its own, or a model; the reward of a completion is the weighted sum of all."""

    fn: MaybeFile | None = None  # `gsm8k`, `exact`, …, `./file.py:name` or `package:name`
    model: LocalOrHub | None = None  # instead: a trained reward model (recipes/reward.py) that scores conversations
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments
    timeout_s: float = 10.0  # for one completion; beyond it the reward is None, and its process is killed
    workers: int = 1  # processes that share the completions

    def __post_init__(self) -> None:
        if (self.fn is None) == (self.model is None):
            raise ValueError("fn, model: exactly one of them")
        if self.model is not None and self.args:
            raise ValueError("args: a function's, a model takes none")
        if self.timeout_s <= 0:
            raise ValueError("timeout_s: must be above 0")
        if self.workers < 1:
            raise ValueError("workers: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Completions of several turns: something answers the model, and it goes on."""

    tools: tuple[MaybeFile, ...] = ()  # functions it may call, `./file.py:name`; their docstrings are shown to it
    environment: MaybeFile | None = None  # `./file.py:name`, (messages, row) -> the next messages, or None to end
    max_turns: int = 4  # answers of the model in one completion
    timeout_s: float = 10.0  # for one call

    def __post_init__(self) -> None:
        if self.tools and self.environment:
            raise ValueError("tools, environment: one of them; an environment may call functions itself")
        if self.max_turns < 1 or self.timeout_s <= 0:
            raise ValueError("max_turns: at least 1; timeout_s: above 0")


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Held-out evaluation: every prompt of data.eval answered greedily, before the first step and after the last."""

    every: Steps = 0  # steps between two, or a share of the run's (0.1); 0: only before the first and after the last
    samples: int = 3  # answers that are printed, and written to samples.jsonl and report.html
    metric: str = "eval_reward"  # the best evaluation has the highest value of this key
    patience: int = 0  # end the run after so many evaluations in a row without a better `metric`; 0: never

    def __post_init__(self) -> None:
        check_steps("every", self.every)
        if min(self.samples, self.patience) < 0:
            raise ValueError("samples, patience: must not be negative")
        if self.patience and not self.every:
            raise ValueError("patience: counts evaluations, so eval.every must be above 0")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Size of a forward pass of the update; there are as many as the completions need."""

    micro_rows: int = 1  # packed rows of data.seq_len tokens in one forward and backward

    def __post_init__(self) -> None:
        if self.micro_rows < 1:
            raise ValueError("micro_rows: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model whose distribution the preset `distill` learns, on completions of the model that is trained."""

    path: LocalOrHub | None = None  # folder or Hub id; it must have the same tokenizer
