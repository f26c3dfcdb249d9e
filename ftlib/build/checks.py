"""What can be known of a config before the first step: every problem of it in one error."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from ftlib import budget, loop, preflight, quant
from ftlib.adapters import token_rows
from ftlib.build.models import attach, backend, default_device, from_scratch, new_tokens, shapes
from ftlib.data import streaming
from ftlib.errors import Problems, UserError, about
from ftlib.evaluation import metrics
from ftlib.kernels.capability import bf16_note, without_bf16
from ftlib.losses import balancing
from ftlib.models import LanguageModel, load
from ftlib.optim import adamw, in_backward, lisa, schedule_free
from ftlib.optim.groups import parameter_groups
from ftlib.parallel import check as mesh
from ftlib.parallel import graphs, recompute, replicas
from ftlib.parallel.run import sizes
from ftlib.preference import check as preference
from ftlib.sections import Reward


def check(cfg: Any, world: int = 1, scores: Sequence[str] | None = None) -> None:
    """Everything that can be known before the first step without a GPU; raises one error listing all problems.

    `cfg` is a recipe's Config: sections it does not have are not checked. `scores`: what the numbers of the recipe's
    own evaluation are called, for `eval.metric`; None: those of the library's.
    """
    problems, found = [], []
    checks = (check_model, lambda cfg: _check_parallel(cfg, world), loop.check, _check_stream, _check_loss)
    checks += (lambda cfg: metrics.check(cfg, scores),)
    for part in (partial(check, cfg) for check in checks):
        try:
            found.append(part())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise Problems(problems)
    built, shards, *_ = found
    if hasattr(cfg, "dpo") or isinstance(getattr(cfg, "reward", None), Reward):
        preference.check(cfg)
    mesh.check(built, cfg, cfg.parallel.cp, cfg.parallel.tp)
    preflight.check(built, cfg, shards)


def check_model(cfg: Any) -> LanguageModel:
    """The model on meta as a run would train it; UserError where its files or the config do not allow that."""
    folder, built = shapes(cfg)
    backend(cfg, built, default_device())
    recompute.check(cfg.memory, len(built.model.layers))
    if cfg.dtype == "bf16" and (old := without_bf16(default_device())):
        warnings.warn(f"dtype=bf16: {bf16_note(old)}", stacklevel=2)
    if not from_scratch(cfg):
        with about("model.path"):
            load.check_weights(built, folder)
    quant.check(cfg, built.config)
    quant.attach(built, cfg)
    trained, fresh = new_tokens(cfg, built)
    attach(built, cfg, trained)
    _check_trained(cfg, built, fresh)
    balancing.check(built, cfg)
    if hasattr(cfg, "optim"):
        parameter_groups(built, cfg.optim)
        adamw.check(built, cfg.optim)
    if hasattr(cfg, "schedule"):
        schedule_free.check(cfg.optim, cfg.schedule)
    return built


def outline(cfg: Any) -> LanguageModel:
    """The model on meta as a run on a GPU would train it, from its config.json alone."""
    _, built = shapes(cfg)
    flex = built.arch.softcap and not built.arch.sinks and cfg.dtype == "bf16"
    built.model.use_attention("flex" if flex else "sdpa")
    quant.attach(built, cfg)
    trained, _ = new_tokens(cfg, built)
    attach(built, cfg, trained)
    return built


def _check_trained(cfg: Any, built: LanguageModel, fresh: tuple[int, ...]) -> None:
    """UserError where rows for new tokens would stay as they began. An adapter has rows of its own for them."""
    adapted = getattr(cfg, "lora", None) is not None
    if fresh and hasattr(cfg, "train") and not adapted and not built.model.embed_tokens.weight.requires_grad:
        raise UserError(
            "new tokens need an embedding that trains, and it is frozen",
            where="tokenizer.add_tokens, train",
            fix="name embed_tokens and lm_head in train.only, or leave them out of train.freeze",
        )
    if cfg.parallel.tp > 1 and any(token_rows.held(built, "policy")):
        raise UserError(
            "rows of new tokens cannot be trained beside matrices that several processes share",
            where="tokenizer.add_tokens, parallel.tp",
            fix="set parallel.tp=1, or lora.modules_to_save=[embed_tokens, lm_head]",
        )


def _check_stream(cfg: Any) -> None:
    if getattr(cfg, "stream", None) is not None:
        streaming.check(cfg.data, cfg.stream, cfg.steps, cfg.eval.exact_match)


def _check_loss(cfg: Any) -> None:
    if getattr(cfg, "neftune", 0) and cfg.parallel.tp > 1:
        what = "processes that share matrices would draw the same noise for different tokens"
        raise UserError(what, where="neftune, parallel.tp", fix="set parallel.tp=1, or neftune=0")
    if hasattr(cfg, "loss") and not cfg.loss.plain and cfg.parallel.tp > 1:
        raise UserError(
            "a loss that looks at all logits of a token needs the whole vocabulary on each process",
            where="loss, parallel.tp",
            fix="set parallel.tp=1, or leave the loss as it is",
        )


def _check_parallel(cfg: Any, world: int) -> int:
    """How many processes share one copy of the parameters."""
    replicate, shard, cp, tp = shape = sizes(cfg.parallel, world)
    replicas.check(cfg, shape)
    if cfg.memory.offload and default_device().type != "cuda":
        what = "offload needs a GPU to offload from, and there is none here"
        raise UserError(what, where="memory.offload", fix="set memory.offload=false")
    budget.check(cfg, world)
    graphs.check(cfg, world)
    check_rows(cfg, replicate * shard)
    in_backward.check(cfg, cfg.batch.micro_rows * replicate * shard, shape)
    lisa.check(cfg, shape)
    return shard * cp * tp


def check_rows(cfg: Any, processes: int) -> None:
    """UserError where the rows of a step do not come out even on so many data-parallel processes."""
    per_forward = cfg.batch.micro_rows * processes
    if getattr(cfg.batch, "rows", per_forward) % per_forward:
        raise UserError(
            f"batch.rows {cfg.batch.rows} is no multiple of batch.micro_rows {cfg.batch.micro_rows} x "
            f"{processes} data-parallel processes (parallel.dp_replicate x parallel.dp_shard)",
            where="batch.rows, batch.micro_rows",
            fix=_rows_fix(cfg.batch.rows, cfg.batch.micro_rows, processes),
        )


def _rows_fix(rows: int, micro_rows: int, processes: int) -> str:
    """Fewer rows a forward train the same where that is enough; other rows a step do not."""
    other = f"batch.rows to a multiple of {micro_rows * processes}"
    if rows % processes:
        return f"set {other}"
    fewer = max(n for n in range(1, micro_rows + 1) if rows // processes % n == 0)
    return f"set batch.micro_rows={fewer}, which trains the same, or {other}"
