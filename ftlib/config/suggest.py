"""Where an unknown key may belong."""

import difflib
import re
from collections.abc import Iterable

NO_KEY = "no such key"

# What other libraries call our keys. Offered only where the recipe has the key.
_ELSEWHERE = {
    "learning_rate": "optim.lr", "max_steps": "steps", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "max_seq_len": "data.seq_len", "max_seq_length": "data.seq_len", "max_length": "data.seq_len",
    "cutoff_len": "data.seq_len", "sequence_len": "data.seq_len", "dataset": "data.sources",
    "train_file": "data.sources", "batch_size": "batch.rows", "gradient_accumulation_steps": "batch.rows",
    "per_device_train_batch_size": "batch.micro_rows", "micro_batch_size": "batch.micro_rows",
    "lora_rank": "lora.rank", "lora_r": "lora.rank", "r": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "target_modules": "lora.targets", "clip_grad_norm": "optim.max_grad_norm",
    "warmup": "schedule.warmup_steps", "lr_scheduler_type": "schedule.name",
    "gradient_checkpointing": "memory.recompute", "model_name_or_path": "model.path",
    "save_steps": "checkpoint.every", "logging_steps": "log.every", "eval_steps": "eval.every",
    "chat_template": "data.template", "packing": "data.pack", "precision": "dtype",
    "loss_type": "dpo.loss", "ref_model": "dpo.reference", "beta": "algorithm.kl_coef", "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high", "reward_funcs": "rewards", "num_generations": "rollout.group",
    "max_completion_length": "rollout.max_new_tokens",
}  # fmt: skip


def near_keys(key: str, known: Iterable[str]) -> list[str]:
    """Up to three of the `known` dotted keys that the unknown dotted `key` may have meant, best first.

    In this order: the same last word in another section, another library's name for one of our keys, a misspelt
    neighbour, such a name misspelt, a misspelt path, a misspelt last word.
    """
    known = list(known)
    key = re.sub(r"\[\d+\]", "[]", key)
    parent, _, leaf = key.rpartition(".")
    leaves: dict[str, list[str]] = {}
    for other in known:
        leaves.setdefault(other.rpartition(".")[2], []).append(other)
    if leaf in leaves:
        return leaves[leaf][:3]
    theirs = {name: ours for name, ours in _ELSEWHERE.items() if ours in known}
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


def unknown_key(key: str, known: Iterable[str], neighbours: Iterable[str]) -> str:
    """The message about a key that does not exist; `neighbours` are the keys beside it."""
    near = near_keys(key, known)
    if near:
        return f"{NO_KEY} (did you mean {' or '.join(map(repr, near))}?)"
    return f"{NO_KEY} (here are: {', '.join(neighbours)})"


def option(word: str, known: Iterable[str]) -> str:
    """How `--name` or `--name=value`, of which there are none here, is written as a key."""
    name, sign, value = word.lstrip("-").partition("=")
    known, name = list(known), name.replace("-", "_")
    near = [name] if name in known else [key for key in near_keys(name, known) if "[" not in key]
    return f"{near[0] if near else name}={value if sign else 'VALUE'}"
