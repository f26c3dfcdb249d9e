"""TRL: what `trl sft`, `dpo`, `kto`, `reward` and `grpo` take with --config (1.16). No key names the trainer:
it is told from those that only one of them has."""

from typing import Any

from ftlib.config.imports import trainer
from ftlib.config.imports.rules import (
    Imported,
    Library,
    adapter,
    apply,
    choice,
    held_out,
    holds,
    listed,
    lost,
    optimizer,
    preferences,
    prompts_too,
    recompute,
    rows_of,
    to,
)

_VLLM = holds("vLLM runs in the run's own process: rollout.engine")
_WHOLE = "completions are drawn from the whole distribution"
_SERVER = lost("vLLM runs in the run's own process: rollout.engine")
_FIXED = lost("the reference stays as it is")

POLICY = {  # of GRPOConfig; Axolotl has them in its section `trl`
    "beta": to("algorithm.kl_coef", float),
    "num_generations": to("rollout.group"),
    "max_completion_length": to("rollout.max_new_tokens"),
    "temperature": to("rollout.temperature", float),
    "epsilon": to("algorithm.clip_low", float),
    "epsilon_high": to("algorithm.clip_high", float),
    "delta": to("algorithm.dual_clip", float),
    "scale_rewards": to(
        "algorithm.advantage",
        choice(true="group", group="group", batch="batch", mean="maxrl", false="center", none="center"),
    ),
    "multi_objective_aggregation": to(
        "algorithm.advantage", choice(sum_then_normalize=None, normalize_then_sum="gdpo")
    ),
    "importance_sampling_level": to("algorithm.ratio", choice(token="token", sequence="sequence")),
    "mask_truncated_completions": to("algorithm.overlong", lambda on: "mask" if on else None),
    "use_vllm": to("rollout.engine", lambda on: "vllm" if on else None),
    "vllm_gpu_memory_utilization": to("rollout.vllm_memory", float),
    "vllm_enable_sleep_mode": to("rollout.vllm_sleep"),
    "vllm_mode": _VLLM,
    "vllm_model_impl": _VLLM,
    "vllm_max_model_length": holds("data.seq_len"),
    "vllm_max_model_len": holds("data.seq_len"),
    "vllm_server_base_url": _SERVER,
    "vllm_server_host": _SERVER,
    "vllm_server_port": _SERVER,
    "vllm_server_timeout": _SERVER,
    "vllm_tensor_parallel_size": lost("each process draws with a whole copy", 1),
    "vllm_importance_sampling_correction": holds("algorithm.correction is truncate"),
    "vllm_importance_sampling_cap": to("algorithm.correction_cap", float),
    "vllm_importance_sampling_mode": lost("algorithm.correction has truncate and mask, token by token"),
    "num_iterations": lost("completions are learned from once; rollout.minibatches splits them", 1),
    "top_p": lost(_WHOLE, 1),
    "top_k": lost(_WHOLE, -1),
    "min_p": lost(_WHOLE),
    "repetition_penalty": lost(_WHOLE, 1),
    "generation_kwargs": lost(_WHOLE),
    "chat_template_kwargs": to("data.template_args"),
    "sync_ref_model": _FIXED,
    "ref_model_mixup_alpha": _FIXED,
    "ref_model_sync_steps": _FIXED,
    "top_entropy_quantile": lost("every token counts", 1),
    "num_generations_eval": holds("held-out prompts are answered once, greedily"),
    "log_completions": holds("rollouts.jsonl has them"),
    "num_completions_to_print": to("rollout.show"),
    "use_liger_loss": holds("own kernels"),
    "ds3_gather_for_generation": holds("weights are gathered for it"),
}
RULES = trainer.RULES | {
    "model_name_or_path": to("model.path"),
    "attn_implementation": holds("the fastest that is right is chosen: model.attention"),
    "dtype": holds("of bf16: weights below an adapter are kept in it too"),
    "torch_dtype": holds("of bf16: weights below an adapter are kept in it too"),
    "model_init_kwargs": lost("read from config.json"),
    "lora_r": to("lora.rank"),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "lora_target_modules": to("lora.targets", lambda names: names if names == "all-linear" else listed(names)),
    "lora_target_parameters": lost("lora.targets takes names of layers"),
    "lora_modules_to_save": to("lora.modules_to_save", listed),
    "lora_task_type": holds("the recipe says"),
    "use_rslora": to("lora.rslora"),
    "use_dora": to("lora.dora"),
    "load_in_4bit": to("model.quantize", lambda on: "nf4" if on else None),
    "load_in_8bit": to("model.quantize", lambda on: "int8" if on else None),
    "bnb_4bit_quant_type": holds("nf4"),
    "use_bnb_nested_quant": holds("nf4 always is"),
    "max_length": to("data.seq_len"),
    "packing": to("data.pack"),
    "packing_strategy": to("data.overlong", choice(bfd="truncate", bfd_split="split", wrapped="split")),
    "truncation_mode": lost("data.overlong: truncate keeps the start", "keep_start"),
    "padding_free": holds("rows never mix"),
    "pad_to_multiple_of": holds("packed rows always have one length"),
    "eval_packing": holds("as in training"),
    "shuffle_dataset": holds("rows are shuffled from the seed"),
    "dataset_num_proc": to("data.workers"),
    "dataset_kwargs": holds("rows are always prepared"),
    "eos_token": holds("the end of a turn is what the chat template writes"),
    "pad_token": to("tokenizer.pad_token"),
    "chat_template_path": to("data.template", lambda name: _jinja(name)),
    "activation_offloading": to("memory.offload"),
    "gradient_checkpointing": to("memory.recompute", recompute),
    "gradient_checkpointing_use_reentrant": holds("one kind, not reentrant"),
    "use_liger_kernel": holds("own kernels"),
    "disable_dropout": holds("models have none; lora.dropout is the adapter's"),
    "ignore_bias_buffers": holds("never needed"),
    "test_split_size": to("data.eval", held_out),
    "streaming": lost("rows are read before training; recipes/pretrain.py streams text"),
    "dataset_streaming": lost("rows are read before training; recipes/pretrain.py streams text"),
    "precompute_ref_log_probs": to("dpo.reference", lambda on: "cache" if on else None),
    "precompute_ref_batch_size": holds("batch.micro_rows"),
    "use_weighting": to("dpo.on_policy", lambda on: True if on else None),
    "ld_alpha": to("dpo.length_alpha", float),
    "discopop_tau": to("dpo.tau", float),
    "reference_free": lost("the reference is the base; simpo and cpo need none"),
    "f_divergence_type": lost("the reverse KL divergence alone", "reverse_kl"),
    "max_prompt_length": holds("data.seq_len holds a prompt and its answer"),
    "center_rewards_coefficient": to("reward.centre", float),
    "router_aux_loss_coef": to("loss.router_aux", float),
    "env": lost("set it in the shell"),
}
TOGETHER = trainer.TOGETHER | {
    "model_revision": "model.path: org/name@revision",
    "use_peft": "picks between recipes lora_sft and full_sft; of dpo and reward, false is lora: null",
    "dataset_name": "data.sources[].path",
    "dataset_config": "data.sources[].subset",
    "dataset_train_split": "data.sources[].split",
    "dataset_test_split": "data.eval, where eval_strategy is not no",
    "dataset_text_field": "data.sources[].columns: {text: …}",
    "datasets": "data.sources",
    "assistant_only_loss": "data.train_on: [assistant]; false is every role",
    "completion_only_loss": "data.train_on: [assistant]",
    "loss_type": "loss.name (sft), dpo.loss (dpo, kto), algorithm.aggregation and algorithm.loss (grpo)",
    "loss_weights": "dpo.loss: {name: weight}",
    "label_smoothing": "dpo.label_smoothing, with dpo.loss cdpo",
    "rpo_alpha": "dpo.sft",
    "desirable_weight": "dpo.desirable",
    "undesirable_weight": "dpo.undesirable",
    "beta": "dpo.beta; of grpo algorithm.kl_coef",
    "reward_funcs": "rewards: built-in ones by name, package.module.name as {fn: package.module:name}",
    "reward_model_name_or_path": "rewards: {model: …}",
    "reward_weights": "rewards[].weight",
    "steps_per_generation": "rollout.prompts, rollout.minibatches",
    "generation_batch_size": "rollout.prompts, rollout.minibatches",
    **{key: f"of grpo: {rule.to or rule.note}" for key, rule in POLICY.items() if key != "beta"},
}
_ONLY = {  # keys, and names of losses, that one trainer alone has
    "grpo": ({"reward_funcs", "reward_model_name_or_path", "num_generations", "max_completion_length", "epsilon"},
             {"grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"}),
    "kto": ({"desirable_weight", "undesirable_weight"}, {"kto", "apo_zero_unpaired"}),
    "reward": ({"center_rewards_coefficient"}, set()),
    "dpo": ({"beta", "precompute_ref_log_probs", "label_smoothing", "loss_weights", "rpo_alpha", "ld_alpha",
             "reference_free", "f_divergence_type", "use_weighting"}, set(trainer.PAIR_LOSSES)),
}  # fmt: skip
_AGGREGATION = {"grpo": "seq", "dapo": "token", "bnpo": "token", "dr_grpo": "const", "cispo": "token"}
_REWARDS: dict[str, dict[str, Any]] = {
    "accuracy_reward": {"fn": "maths"},
    "reasoning_accuracy_reward": {"fn": "maths"},
    "think_format_reward": {"fn": "regex", "args": {"pattern": "^<think>(?!.*<think>).*?</think>"}},
    "get_soft_overlong_punishment": {"fn": "soft_overlong", "args": {"longest": 1280, "margin": 256}},
}


def _jinja(name: Any) -> str:
    if not str(name).endswith((".jinja", ".j2")):
        raise ValueError(f"{name!r}: another tokenizer's template must be in a file: data.template takes a .jinja file")
    return name


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Trainer, rows, loss, optimizer, and what TRL does where a key is absent."""
    kind = _trainer(theirs)
    peft = bool(theirs.get("use_peft"))
    made.notes.append(f"taken for a config of `trl {kind}`, since its keys are those of that command")
    made.recipe = {"sft": "lora_sft" if peft else "full_sft", "kto": "dpo"}.get(kind, kind)
    if theirs.get("model_revision") not in (None, "main"):
        made.set("model.path", f"{theirs.get('model_name_or_path')}@{theirs['model_revision']}")
    if not peft:
        made.drop("lora")  # without use_peft they say nothing there
    _sources(theirs, made)
    optimizer(made, "optim", theirs.get("optim") or "adamw")
    if not made.get("steps"):
        made.default("epochs", 3.0)
    made.default("log.every", 10)
    for decide in (trainer.finish, trainer.decay):
        decide(theirs, made)
    micro, accumulation = theirs.get("per_device_train_batch_size") or 8, theirs.get("gradient_accumulation_steps")
    if kind == "grpo":
        policy(theirs, made, micro, accumulation)
    else:
        rows_of(made, micro, accumulation)
    if kind == "sft":
        _supervised(theirs, made)
    elif kind in ("dpo", "kto"):
        _preferences(theirs, made, rated=kind == "kto")
    adapter(made, on=peft)
    _left_out(theirs, made, kind, peft)


def _trainer(theirs: dict[str, Any]) -> str:
    """The command that the file is for."""
    losses = set(map(str, listed(theirs.get("loss_type") or [])))
    if theirs.get("lora_task_type") == "SEQ_CLS":
        return "reward"
    return next((name for name, (keys, own) in _ONLY.items() if keys & theirs.keys() or losses & own), "sft")


def _sources(theirs: dict[str, Any], made: Imported) -> None:
    """`datasets`, which wins, or the one dataset that is named; the same one's other split is held out."""
    split = theirs.get("dataset_train_split")
    named = {"path": theirs.get("dataset_name"), "name": theirs.get("dataset_config"), "split": split}
    entries = theirs.get("datasets") or ([named] if named["path"] else [])
    text = theirs.get("dataset_text_field")
    found = []
    for entry in entries:
        source = {"subset": entry.get("name"), "split": None if entry.get("split") == "train" else entry.get("split"),
                  "columns": {"text": text} if text not in (None, "text") else None}  # fmt: skip
        source = {key: value for key, value in source.items() if value}
        files = entry.get("data_files") or entry.get("data_dir") or entry.get("path")
        found += [{"path": place, **source} for place in listed(files)]
    if found:
        made.set("data.sources", found)
    strategy = str(theirs.get("eval_strategy") or theirs.get("evaluation_strategy") or "no").lower()
    if strategy not in ("no", "false") and len(found) == 1 and not made.get("data.eval"):
        made.set("data.eval", [found[0] | {"split": theirs.get("dataset_test_split") or "test"}])


def _supervised(theirs: dict[str, Any], made: Imported) -> None:
    """Which tokens count: every role's, unless one of two switches is on."""
    if theirs.get("assistant_only_loss") or theirs.get("completion_only_loss"):
        made.set("data.train_on", ["assistant"])
    else:
        made.default("data.train_on", prompts_too(True))
        if theirs.get("completion_only_loss") is None:
            made.notes.append(
                "rows of prompt and completion train the completion alone there: data.train_on=[assistant]"
            )
    if theirs.get("loss_type") == "dft":
        made.set("loss.name", "dft")
    elif theirs.get("loss_type") not in (None, "nll", "chunked_nll"):
        made.lost.append(("loss_type", f"{theirs['loss_type']!r}: cross_entropy, dft and eaft are there: loss.name"))


def _preferences(theirs: dict[str, Any], made: Imported, rated: bool) -> None:
    """DPO's losses and constants, or KTO's."""
    beta = theirs.get("beta")
    if rated:
        if theirs.get("loss_type") not in (None, "kto"):
            made.lost.append(
                ("loss_type", f"{theirs['loss_type']!r}: for rated answers there are kto and bco; kto is used")
            )
        preferences(made, "kto", beta=beta, desirable=theirs.get("desirable_weight"),
                    undesirable=theirs.get("undesirable_weight"))  # fmt: skip
        return
    losses = trainer.pair_losses(made, "loss_type", theirs.get("loss_type"))
    smoothing = theirs.get("label_smoothing") or (0.0 if "robust" in losses else None)
    preferences(made, losses, theirs.get("loss_weights"), beta=beta, sft=theirs.get("rpo_alpha"),
                label_smoothing=smoothing)  # fmt: skip


def policy(settings: dict[str, Any], made: Imported, micro: Any, accumulation: Any, prefix: str = "") -> None:
    """GRPO's `settings`; there a batch counts completions, here prompts."""
    decided = {key: value for key, value in settings.items() if key in POLICY or (prefix and key not in TOGETHER)}
    apply(POLICY, decided, made, prefix)
    loss = settings.get("loss_type") or "dapo"
    if loss in _AGGREGATION:
        made.set("algorithm.aggregation", _AGGREGATION[loss])
    else:
        made.lost.append((f"{prefix}loss_type", f"{loss!r} has no equivalent; that of algorithm.preset is used"))
    clip_low = made.get("algorithm.clip_low", 0.2)
    if loss == "cispo":
        made.set("algorithm.loss", "cispo")
        made.set("algorithm.ratio_cap", made.get("algorithm.clip_high", clip_low))
        made.drop("algorithm.clip_low")
        made.drop("algorithm.clip_high")
    else:
        made.default("algorithm.clip_high", clip_low)
    if made.get("rollout.engine") != "vllm":
        made.drop("rollout.vllm_memory")
        made.drop("rollout.vllm_sleep")
        made.drop("algorithm.correction_cap")  # of what vLLM and the trainer disagree in
    made.default("rollout.max_new_tokens", 256)
    made.default("data.seq_len", (settings.get("max_prompt_length") or 1024) + made.get("rollout.max_new_tokens"))
    _completions(settings, made, int(micro or 1), int(accumulation) if isinstance(accumulation, int) else 1)
    _rewards(settings, made, prefix)


def _completions(settings: dict[str, Any], made: Imported, micro: int, accumulation: int) -> None:
    """Prompts of one set of completions, and how many updates are made of it, for one device."""
    drawn = settings.get("generation_batch_size") or micro * (settings.get("steps_per_generation") or accumulation)
    prompts, updates = max(1, drawn // made.get("rollout.group", 8)), max(1, drawn // (micro * accumulation))
    made.set("rollout.prompts", prompts)
    if updates > 1:
        made.set("rollout.minibatches", min(updates, prompts))
        if made.get("steps"):  # there every update is a step
            made.set("steps", max(1, made.get("steps") // updates))
    made.notes.append(f"rollout.prompts {prompts} is for one device: multiply it by their number")


def _rewards(settings: dict[str, Any], made: Imported, prefix: str) -> None:
    """Functions by name or by their place in a package, models by their path; each with its weight."""
    found: list[dict[str, Any]] = []
    if settings.get("reward_model_name_or_path"):
        found.append({"model": settings["reward_model_name_or_path"]})
    for name in listed(settings.get("reward_funcs") or []):
        module, _, function = str(name).rpartition(".")
        if name not in _REWARDS and not module:
            made.lost.append((f"{prefix}reward_funcs", f"{name!r}: name its file, rewards: [{{fn: ./file.py:{name}}}]"))
        else:
            found.append(dict(_REWARDS.get(name) or {"fn": f"{module}:{function}"}))
    for reward, weight in zip(found, settings.get("reward_weights") or [], strict=False):
        reward["weight"] = float(weight)
    if found:
        made.set("rewards", found)
    if any(reward.get("fn") == "maths" for reward in found):
        made.notes.append("the reward maths compares with the column answer; accuracy_reward there with solution")


def _left_out(theirs: dict[str, Any], made: Imported, kind: str, peft: bool) -> None:
    """Where its defaults, and those of Hugging Face's Trainer below it, differ from ours."""
    made.default("optim.lr", {"sft": 2e-5, "reward": 1e-4}.get(kind, 1e-6))
    if theirs.get("lr_scheduler_type") is None:
        made.default("schedule.name", "linear")
    made.default("schedule.warmup_steps", 0)
    made.default("seed", 42)
    if kind != "grpo":
        made.default("data.seq_len", 1024)
        made.default("data.pack", False)
        if kind != "reward":  # which leaves long rows out, as we do
            made.default("data.overlong", "truncate")
    if kind == "reward":
        made.default("reward.centre", 0.0)
    if peft:
        if made.recipe not in ("dpo", "grpo"):
            made.default("lora.dropout", 0.05)
        made.default("lora.targets", ["q_proj", "v_proj"])  # PEFT's of most families


TRL = Library(
    "TRL",
    ("dataset_name", "datasets", "use_peft", "reward_funcs", "num_generations", "assistant_only_loss"),
    RULES,
    TOGETHER,
    finish,
)
