"""How a run uses the machine, what it saves and what it says."""

from dataclasses import dataclass
from typing import Literal

from ftlib.errors import did_you_mean
from ftlib.sections.steps import Steps, check_steps

LOGS = ("console", "tensorboard", "wandb", "mlflow")
LEANER = ("none", "selective", "except_attention", "full")  # what backward computes again, from fast to lean


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Speed against memory."""

    recompute: Literal["none", "selective", "except_attention", "full"] = "full"  # in backward; each leaves less
    recompute_layers: int = 0  # of that many blocks, the first; 0: of all
    recompute_rest: Literal["none", "selective", "except_attention"] = "none"  # of the others
    offload: bool = False  # what backward needs, and a frozen untied embedding, wait in pinned host memory
    tiled_mlp: int = 0  # tokens at a time in feed-forward layers, again in backward: for long rows; 0: all at once
    budget_gib: float | Literal["auto"] | None = None  # of the GPU: recompute, offload and tiles are found by trial
    compile: Literal["auto"] | bool = "auto"  # torch.compile of each block; auto: on with CUDA, off on CPU
    cuda_graph: bool = False  # launch all blocks at once: for small models on one GPU, whose steps wait for the host

    def __post_init__(self) -> None:
        if self.tiled_mlp < 0:
            raise ValueError("tiled_mlp: must not be negative")
        if self.budget_gib not in (None, "auto") and self.budget_gib <= 0:
            raise ValueError("budget_gib: must be above 0")
        if self.budget_gib is not None and (
            self.offload or self.tiled_mlp or self.recompute_layers or self.recompute_rest != "none"
        ):
            raise ValueError("budget_gib: finds offload, tiled_mlp, recompute_layers and _rest itself, leave them out")
        if self.recompute_layers < 0:
            raise ValueError("recompute_layers: must not be negative")
        if self.recompute_layers and self.recompute == "none":
            raise ValueError("recompute_layers: with recompute=none there is nothing to compute again; set full")
        if self.recompute_layers == 0 and self.recompute_rest != "none":
            raise ValueError("recompute_rest: is for the blocks behind recompute_layers; set that too, or leave it out")
        if self.recompute_layers and LEANER.index(self.recompute_rest) >= LEANER.index(self.recompute):
            raise ValueError("recompute_rest: must keep more than recompute does; for all blocks leave both out")

    def lean(self, count: int) -> int:
        """How many of `count` blocks `recompute` is about, the first."""
        return min(self.recompute_layers or count, count)

    def of_blocks(self, count: int) -> list[str]:
        """What is computed again of each of `count` blocks."""
        lean = self.lean(count)
        return [self.recompute] * lean + [self.recompute_rest] * (count - lean)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes are used. dp_replicate * dp_shard * cp * tp must be their number."""

    dp_replicate: int = 1  # copies of the sharded model (HSDP); with dp_shard=1 this is plain data parallelism
    dp_shard: int = -1  # processes that share one copy of the model (FSDP2); -1: all that are left
    cp: int = 1  # processes that share one sequence
    cp_style: Literal["ulysses", "allgather", "ring"] = "ulysses"  # heads for sequence; keys gathered; keys passed on
    tp: int = 1  # processes that share each matrix
    timeout_s: float = 600.0  # a process that waits longer for the others ends the run

    def __post_init__(self) -> None:
        for key in ("dp_replicate", "cp", "tp"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: must be at least 1")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError("dp_shard: must be at least 1, or -1 for all processes that are left")
        if self.timeout_s <= 0:
            raise ValueError("timeout_s: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Resumable training state in <output_dir>/checkpoints/step_NNNNNN."""

    every: Steps = 100  # steps between two saves, or a share of the run's (0.1); 0: only on a signal
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = False  # also keep the state of the best evaluation (eval.metric); final/ is made from it
    resume: Literal["auto", "required", "never"] = "auto"  # auto: continue if there is a good checkpoint
    background: Literal["auto"] | bool = "auto"  # written while training goes on; auto: on with CUDA, off on CPU

    def __post_init__(self) -> None:
        check_steps("every", self.every)
        if self.keep < 1:
            raise ValueError("keep: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Held-out evaluation: before the first step, every `every` steps, after the last."""

    every: Steps = 0  # steps between two, or a share of the run's (0.1); 0: only before the first and after the last
    exact_match: int = 0  # held-out conversations answered greedily and compared with their reference answer
    max_new_tokens: int = 64  # length limit of such an answer
    samples: int = 3  # of those, how many are printed, and written to samples.jsonl and report.html
    prompts: tuple[str, ...] = ()  # your own, answered beside those; where rows are plain text, continued
    metric: str = "eval_loss"  # the best evaluation has the lowest (of a loss) or highest value of this key
    patience: int = 0  # end the run after so many evaluations in a row without a better `metric`; 0: never

    def __post_init__(self) -> None:
        check_steps("every", self.every)
        if min(self.exact_match, self.samples, self.patience) < 0 or self.max_new_tokens < 1:
            raise ValueError("exact_match, samples, patience: not negative; max_new_tokens: at least 1")
        if self.patience and not self.every:
            raise ValueError("patience: counts evaluations, so eval.every must be above 0")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is reported while training. metrics.jsonl always has one row a step."""

    every: int = 1  # steps between two printed lines
    to: tuple[str, ...] = ("console",)  # where rows also go: `console`, `tensorboard`, `wandb`, `mlflow`
    project: str = "ftlib"  # W&B project or MLflow experiment
    name: str | None = None  # of the run there; null: the name of output_dir
    statistics: int = 0  # steps between norms of gradients and weights by kind of parameter (pretrain); 0: none

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError("every: must be at least 1")
        for name in self.to:
            if name not in LOGS:
                raise ValueError(f"to: there is no {name!r}{did_you_mean(name, LOGS)}; there are {', '.join(LOGS)}")
