"""Hugging Face's Trainer: its arguments, which LLaMA-Factory and TRL take as they are and Axolotl mostly."""

from typing import Any

from ftlib.config.imports.rules import (
    Imported,
    betas,
    choice,
    holds,
    listed,
    lost,
    offload_states,
    precision,
    schedule,
    steps_or_share,
    to,
)

_SHARDED = holds("more than one process shards by itself: parallel.dp_shard")


def whole(value: Any) -> int:
    """A number of steps where ours may not be a share of the run."""
    if 0 < float(value) < 1:
        raise ValueError(f"{value} is a share of the run: log.every counts steps")
    if float(value) < 1:
        raise ValueError(f"{value} logs nothing: leave it out, every step is logged")
    return int(value)


def trackers(value: Any) -> list[str] | None:
    """`report_to` as log.to."""
    names = [name for name in listed(value) if name not in ("none", "all")]
    find = choice(wandb="wandb", tensorboard="tensorboard", mlflow="mlflow")
    return ["console", *(find(name) for name in names)] if names else None


COMMON = {  # under the same names in Axolotl too
    "max_steps": to("steps", lambda steps: steps if steps > 0 else None),
    "learning_rate": to("optim.lr", float),
    "weight_decay": to("optim.weight_decay", float),
    "adam_epsilon": to("optim.eps", float),
    "max_grad_norm": to("optim.max_grad_norm", lambda norm: float(norm) or None),
    "bf16": to("dtype", precision),
    "torch_compile": to("memory.compile"),
    "logging_steps": to("log.every", whole),
    "save_total_limit": to("checkpoint.keep"),
    "load_best_model_at_end": to("checkpoint.keep_best"),
    "metric_for_best_model": to("eval.metric", choice(loss="eval_loss", eval_loss="eval_loss")),
    "greater_is_better": holds("told from eval.metric"),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "neftune_noise_alpha": to("neftune", float),
    "ddp_timeout": to("parallel.timeout_s", float),
    "ddp_find_unused_parameters": holds("never needed"),
    "local_rank": holds("set by the launcher"),
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "dataloader_num_workers": holds("rows are tokenised before training"),
    "dataloader_pin_memory": holds("automatic"),
    "dataloader_prefetch_factor": holds("rows are tokenised before training"),
    "group_by_length": lost("rows are drawn in any order; data.pack fills rows instead"),
    "remove_unused_columns": holds("never matters"),
    "resume_from_checkpoint": holds("checkpoint.resume is auto: same output_dir, same command"),
    "save_only_model": holds("final/"),
    "save_safetensors": holds("always"),
    "tf32": holds("bf16 matrices need no tf32"),
    "fp16": lost("bf16 is used; dtype: fp32 is there"),
    "trust_remote_code": lost("code of a repository is never run"),
}
RULES = COMMON | {
    "num_train_epochs": to("epochs", float),
    "lr_scheduler_type": to("schedule.name", schedule),
    "report_to": to("log.to", trackers),
    "run_name": to("log.name"),
    "do_train": holds("tune run trains"),
    "do_eval": holds("data.eval is evaluated"),
    "per_device_eval_batch_size": holds("batch.micro_rows"),
    "gradient_checkpointing_kwargs": holds("one kind, not reentrant"),
    "overwrite_output_dir": holds("checkpoint.resume: never starts over"),
    "push_to_hub": lost("tune push"),
}
CADENCE = {
    "eval_steps": "eval.every: a number of steps, or a share of the run's",
    "eval_strategy": "eval.every; epoch is a share of the run",
    "evaluation_strategy": "eval.every; epoch is a share of the run",
    "save_steps": "checkpoint.every: a number of steps, or a share of the run's",
    "save_strategy": "checkpoint.every; epoch is a share of the run; best is checkpoint.keep_best",
    "warmup_steps": "schedule.warmup_steps: a number of steps, or a share of the run's",
    "warmup_ratio": "schedule.warmup_steps, a share of the run",
    "adam_beta1": "optim.betas[0]",
    "adam_beta2": "optim.betas[1]",
}
TOGETHER = CADENCE | {
    "optim": "optim.name; AdamW of 8 or 4 bits: optim.states",
    "per_device_train_batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows = per_device_train_batch_size x gradient_accumulation_steps x devices",
    "lr_scheduler_kwargs": "schedule.min_ratio, schedule.decay_steps",
}
PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "apo_zero",
               "apo_down", "discopop", "sigmoid_norm", "sft")  # fmt: skip
_PAIRED = choice(**{name: name for name in PAIR_LOSSES}, aot_pair="aot_unpaired", aot_unpaired="aot_unpaired")
_EVERY = (
    ("eval.every", "eval_steps", "evals_per_epoch", ("eval_strategy", "evaluation_strategy")),
    ("checkpoint.every", "save_steps", "saves_per_epoch", ("save_strategy",)),
)


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Betas, warm-up, the pace of evaluations and saves, what waits in host memory; the optimizer is known by now."""
    betas(theirs, made)
    if theirs.get("max_grad_norm") == 0:  # read as no clipping
        made.set("optim.max_grad_norm", None)
    if theirs.get("fp16"):  # named as lost: bf16 is nearest
        made.set("dtype", "bf16")
    _warm_up(theirs, made)
    for ours, steps, counted, strategies in _EVERY:
        _pace(theirs, made, ours, steps, counted, strategies)
    for key in ("deepspeed", "fsdp", "fsdp_config"):
        if _offloads(theirs.get(key)):
            offload_states(made, key)
            break


def pair_losses(made: Imported, key: str, named: Any) -> list[str]:
    """Losses over pairs by TRL's names; DPO's own in place of one that is not here."""
    try:
        return [_PAIRED(name) for name in listed(named or "sigmoid")]
    except ValueError as error:
        made.lost.append((key, str(error)))
        return ["sigmoid"]


def decay(theirs: dict[str, Any], made: Imported) -> None:
    """What `lr_scheduler_kwargs` says of a schedule that is here."""
    settings = theirs.get("lr_scheduler_kwargs") or {}
    if not isinstance(settings, dict):
        made.lost.append(("lr_scheduler_kwargs", "write it as a mapping: {min_lr: 1e-5}"))
        return
    name, peak = made.get("schedule.name"), made.get("optim.lr")
    if settings.get("min_lr_rate") or settings.get("min_lr_ratio"):
        made.set("schedule.min_ratio", float(settings.get("min_lr_rate") or settings["min_lr_ratio"]))
    elif settings.get("min_lr") and peak:
        made.set("schedule.min_ratio", float(f"{float(settings['min_lr']) / peak:.6g}"))
    if name == "wsd" and settings.get("num_decay_steps"):
        made.set("schedule.decay_steps", int(settings["num_decay_steps"]))
    read = ("min_lr", "min_lr_rate", "min_lr_ratio", "num_decay_steps", "num_stable_steps")
    made.lost += [
        (f"lr_scheduler_kwargs.{key}", "not a setting of a schedule that is here")
        for key in settings
        if key not in read
    ]


def _warm_up(theirs: dict[str, Any], made: Imported) -> None:
    """Steps win over a ratio, as they do there; either may be a share, and stays one."""
    for key in ("warmup_steps", "warmup_ratio"):
        if theirs.get(key):
            try:
                made.set("schedule.warmup_steps", steps_or_share(theirs[key]))
            except ValueError as error:
                made.lost.append((key, str(error)))
            return
    if theirs.get("warmup_steps") == 0 or theirs.get("warmup_ratio") == 0:
        made.set("schedule.warmup_steps", 0)


def _pace(
    theirs: dict[str, Any], made: Imported, ours: str, steps: str, counted: str, strategies: tuple[str, ...]
) -> None:
    """So many steps, a share of the run, or so many times an epoch: a share too, where the epochs are known."""
    named = next((key for key in strategies if theirs.get(key) is not None), None)
    strategy = str(theirs[named]).lower() if named else "steps"
    if theirs.get(counted) or strategy == "epoch":
        times = float(theirs.get(counted) or 1)
        _each_epoch(made, ours, counted if theirs.get(counted) else named, times)
    elif strategy in ("no", "false"):
        if ours == "checkpoint.every":
            made.set(ours, 0)  # what is asked for: final/ alone
    elif strategy == "best":
        made.set("checkpoint.keep_best", True)
    elif theirs.get(steps):
        try:
            made.set(ours, steps_or_share(theirs[steps]))
        except ValueError as error:
            made.lost.append((steps, str(error)))
    elif named and ours == "eval.every":
        made.set(ours, made.get("log.every", 10))  # the Trainer evaluates as often as it logs


def _each_epoch(made: Imported, ours: str, key: str, times: float) -> None:
    """`times` an epoch as a share of the run; once in all is what a run does at its end anyway."""
    epochs = made.get("epochs", 1.0)
    if made.get("steps"):
        why = f"max_steps ends the run, in whatever epoch: set {ours} to steps, or to a share of the run"
        made.lost.append((key, why))
    elif times * epochs > 1:
        made.set(ours, float(f"{1 / (times * epochs):.6g}"))
    else:
        made.notes.append(f"{key}: the end of the run is the only time: it is evaluated, and saved in final/, anyway")


def _offloads(value: Any) -> bool:
    """Whether a setting of DeepSpeed or FSDP, or the name of its file, speaks of offload and does not switch it off."""
    if isinstance(value, dict):
        return any(_is_on(item) if "offload" in key else _offloads(item) for key, item in value.items())
    return any("offload" in str(item).lower() for item in listed(value or []))


def _is_on(item: Any) -> bool:
    return item.get("device", "cpu") != "none" if isinstance(item, dict) else item not in (False, None, "none")
