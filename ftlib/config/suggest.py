"""Where an unknown key may belong."""

import difflib
import re
from collections.abc import Iterable

NO_KEY = "no such key"
_KEY = re.compile(r"[\w.\[\]]+")

# What other libraries call our keys, and where it helps which value or how. Of several keys (`a|b`) the first one that
# the recipe has is offered, if it has any.
_ELSEWHERE = {
    "learning_rate": "optim.lr", "max_steps": "steps", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "max_seq_len": "data.seq_len", "max_seq_length": "data.seq_len", "max_length": "data.seq_len",
    "cutoff_len": "data.seq_len", "sequence_len": "data.seq_len", "dataset": "data.sources",
    "train_file": "data.sources", "max_samples": "data.sources[].split, such as '[:1000]'",
    "max_train_samples": "data.sources[].split, such as '[:1000]'", "chat_template": "data.template",
    "packing": "data.pack", "assistant_only_loss": "data.train_on, which is [assistant] unless set",
    "train_on_inputs": "data.train_on", "batch_size": "batch.rows", "per_device_train_batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows, which counts the rows of a step over all devices|rollout.prompts",
    "micro_batch_size": "batch.micro_rows", "lora_rank": "lora.rank", "lora_r": "lora.rank", "r": "lora.rank",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "target_modules": "lora.targets",
    "neftune_noise_alpha": "neftune", "load_in_4bit": "model.quantize=nf4", "load_in_8bit": "model.quantize=int8",
    "model_name_or_path": "model.path", "attn_implementation": "model.attention", "torch_dtype": "dtype",
    "precision": "dtype", "bf16": "dtype=bf16", "fp16": "dtype=bf16; there is no float16",
    "clip_grad_norm": "optim.max_grad_norm", "adam_beta1": "optim.betas", "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps", "cpu_offload": "optim.offload", "lr_scheduler_type": "schedule.name",
    "warmup": "schedule.warmup_steps", "warmup_ratio": "schedule.warmup_steps, which may be a share of the run (0.03)",
    "gradient_checkpointing": "memory.recompute", "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every, in steps or as a share of the run (0.1)", "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.keep_best", "eval_steps": "eval.every",
    "eval_strategy": "eval.every, in steps or as a share of the run (0.1)",
    "evaluation_strategy": "eval.every, in steps or as a share of the run (0.1)",
    "metric_for_best_model": "eval.metric", "early_stopping_patience": "eval.patience", "logging_steps": "log.every",
    "dp": "parallel.dp_shard, which shares the model, or parallel.dp_replicate, which copies it",
    "ddp": "parallel.dp_replicate", "fsdp": "parallel.dp_shard", "zero": "parallel.dp_shard",
    "data_parallel_shard_degree": "parallel.dp_shard", "data_parallel_replicate_degree": "parallel.dp_replicate",
    "dp_shard_size": "parallel.dp_shard", "dp_replicate_size": "parallel.dp_replicate",
    "tensor_parallel_size": "parallel.tp", "tensor_parallel_degree": "parallel.tp",
    "context_parallel_size": "parallel.cp", "context_parallel_degree": "parallel.cp",
    "sequence_parallel_degree": "parallel.cp",
    "report_to": "log.to", "run_name": "log.name", "wandb_project": "log.project",
    "loss_type": "dpo.loss|algorithm.preset, or algorithm.aggregation alone", "beta": "dpo.beta|algorithm.kl_coef",
    "ref_model": "dpo.reference", "precompute_ref_log_probs": "dpo.reference=cache", "rpo_alpha": "dpo.sft",
    "ld_alpha": "dpo.length_alpha", "epsilon": "algorithm.clip_low", "epsilon_high": "algorithm.clip_high",
    "scale_rewards": "algorithm.advantage: group divides by the deviation, center does not",
    "importance_sampling_level": "algorithm.ratio", "mask_truncated_completions": "algorithm.overlong=mask",
    "reward_funcs": "rewards", "num_generations": "rollout.group", "max_completion_length": "rollout.max_new_tokens",
    "num_iterations": "rollout.minibatches: completions are learnt from once, in so many steps",
    "use_vllm": "rollout.engine=vllm", "vllm_gpu_memory_utilization": "rollout.vllm_memory",
}  # fmt: skip
# Keys of other libraries for what there is not, and what there is in its place.
_NOWHERE = {
    "pp": "there are no pipeline stages here; parallel.dp_shard and parallel.tp share a model among GPUs",
    "ep": "experts have no processes of their own here; parallel.tp and parallel.dp_shard share them",
}
# Values that mean a setting of another key here.
_VALUES = dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"), "optim.states=int8")


def near_keys(key: str, known: Iterable[str]) -> list[str]:
    """Up to three of the `known` dotted keys that the unknown dotted `key` may have meant, best first."""
    return [_KEY.match(near)[0] for near in _near(key, list(known))]


def _near(key: str, known: list[str]) -> list[str]:
    """`near_keys` with what `_ELSEWHERE` has to say of them.

    In this order: the same last word in another section, another library's name for one of our keys, a misspelt
    neighbour, such a name misspelt, a misspelt path, a misspelt last word.
    """
    key = re.sub(r"\[\d+\]", "[]", key)
    parent, _, leaf = key.rpartition(".")
    leaves: dict[str, list[str]] = {}
    for other in known:
        leaves.setdefault(other.rpartition(".")[2], []).append(other)
    if leaf in leaves:
        return leaves[leaf][:3]
    theirs = _theirs(known)
    if leaf.lower() in theirs:
        return [theirs[leaf.lower()]]
    neighbours = [other for other in known if other.rpartition(".")[0] == parent]
    if near := difflib.get_close_matches(key, neighbours, n=1, cutoff=0.8):
        return near
    by_leaf = {other.rpartition(".")[2]: other for other in neighbours}
    if near := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6):
        return [by_leaf[near[0]]]
    if near := difflib.get_close_matches(leaf.lower(), theirs, n=1, cutoff=0.85):
        return [theirs[near[0]]]
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.7):
        return near
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[near[0]][:3] if near else []


def _theirs(known: list[str]) -> dict[str, str]:
    """Of `_ELSEWHERE` what there is among the `known` keys."""
    found, keys = {}, set(known)
    for name, ours in _ELSEWHERE.items():
        if here := [option for option in ours.split("|") if _KEY.match(option)[0] in keys]:
            found[name] = here[0]
    return found


def unknown_key(key: str, known: Iterable[str], neighbours: Iterable[str]) -> str:
    """The message about a key that does not exist; `neighbours` are the keys beside it."""
    known, leaf = list(known), key.rpartition(".")[2]
    if leaf in _NOWHERE and "parallel.tp" in known:
        return f"{NO_KEY}: {_NOWHERE[leaf]}"
    if near := _near(key, known):
        return f"{NO_KEY} (did you mean {' or '.join(map(_quoted, near))}?)"
    return f"{NO_KEY} (here are: {', '.join(neighbours)})"


def _quoted(near: str) -> str:
    """A key, with a value that goes with it, in quotes; what is said of it behind them."""
    word = re.match(_KEY.pattern + r"(=\w+)?", near)[0]
    return f"'{word}'{near.removeprefix(word)}"


def other_key(value: object) -> str:
    """` (…)` about a value of another library that is a setting of another key here, or an empty string."""
    ours = _VALUES.get(value) if isinstance(value, str) else None
    return f" (here that is {ours})" if ours else ""


def option(word: str, known: Iterable[str]) -> str:
    """How `--name` or `--name=value`, of which there are none here, is written as a key."""
    name, sign, value = word.lstrip("-").partition("=")
    known, name = list(known), name.replace("-", "_")
    near = [name] if name in known else [key for key in near_keys(name, known) if "[" not in key]
    return f"{near[0] if near else name}={value if sign else 'VALUE'}"
