"""Axolotl: flat keys, https://docs.axolotl.ai."""

from typing import Any

from ftlib.config.imports.rules import (
    Imported,
    Library,
    betas,
    choice,
    holds,
    listed,
    lost,
    optimizer,
    precision,
    preferences,
    prompts_too,
    recompute,
    roles,
    rows_of,
    schedule,
    to,
    track,
)

_AUTO = holds("the fastest that is right is chosen: model.attention")
_TRACKER = lost("no equivalent; log.to names trackers, their own environment variables say the rest")
_SHARDED = holds("more than one process shards by itself: parallel.dp_shard")

RULES = {
    "base_model": to("model.path"),
    "tokenizer_config": to("tokenizer.path"),
    "lora_r": to("lora.rank"),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "lora_target_modules": to("lora.targets"),
    "lora_target_linear": to("lora.targets", lambda on: "all-linear" if on else None),
    "lora_modules_to_save": to("lora.modules_to_save", listed),
    "lora_model_dir": to("lora.start_from"),
    "peft_use_rslora": to("lora.rslora"),
    "peft_use_dora": to("lora.dora"),
    "loraplus_lr_ratio": to("lora.lr_ratio", float),
    "peft_init_lora_weights": to(
        "lora.init", choice(true="kaiming", **{name: name for name in ("pissa", "olora", "loftq", "gaussian")})
    ),
    "relora_cpu_offload": holds("matrices are merged one after the other, where they are"),
    "jagged_restart_anneal_steps": lost("the rate stays on its schedule up to a merge"),
    "lisa_n_layers": to("lisa.layers"),
    "lisa_step_interval": to("lisa.every"),
    "lisa_layers_attribute": holds("the blocks are known"),
    "unfrozen_parameters": to("train.only", listed),
    "sequence_len": to("data.seq_len"),
    "sample_packing": to("data.pack"),
    "val_set_size": to("data.eval", lambda size: float(size) if size else None),
    "excess_length_strategy": to("data.overlong", choice(drop="drop", truncate="truncate", **{"raise": "error"})),
    "chat_template": to("data.template", lambda name: None if str(name).startswith("tokenizer_default") else name),
    "num_epochs": to("epochs", float),
    "max_steps": to("steps", lambda steps: steps if steps > 0 else None),
    "learning_rate": to("optim.lr", float),
    "weight_decay": to("optim.weight_decay", float),
    "adam_epsilon": to("optim.eps", float),
    "max_grad_norm": to("optim.max_grad_norm", lambda norm: float(norm) or None),
    "lr_scheduler": to("schedule.name", schedule),
    "cosine_min_lr_ratio": to("schedule.min_ratio", float),
    "warmup_steps": to("schedule.warmup_steps"),
    "bf16": to("dtype", precision),
    "bfloat16": to("dtype", precision),
    "gradient_checkpointing": to("memory.recompute", recompute),
    "torch_compile": to("memory.compile"),
    "logging_steps": to("log.every"),
    "eval_steps": to("eval.every", int),
    "save_steps": to("checkpoint.every", int),
    "save_total_limit": to("checkpoint.keep"),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "dp_shard_size": to("parallel.dp_shard"),
    "dp_replicate_size": to("parallel.dp_replicate"),
    "context_parallel_size": to("parallel.cp"),
    "tensor_parallel_size": to("parallel.tp"),
    "model_type": holds("read from config.json"),
    "tokenizer_type": holds("told from the tokenizer's files"),
    "is_llama_derived_model": holds("read from config.json"),
    "base_model_config": holds("read from config.json"),
    "strict": holds("unknown keys are always errors"),
    "tf32": holds("bf16 matrices need no tf32"),
    "flash_attention": _AUTO,
    "sdp_attention": _AUTO,
    "flex_attention": _AUTO,
    "xformers_attention": _AUTO,
    "attn_implementation": _AUTO,
    "eager_attention": _AUTO,
    "s2_attention": lost("no shifted attention"),
    "pad_to_sequence_len": holds("rows always have one length"),
    "eval_sample_packing": holds("as in training"),
    "sample_packing_group_size": holds("the whole epoch is packed"),
    "group_by_length": holds("packing does better"),
    "dataset_prepared_path": holds("tokenised rows are cached by themselves"),
    "shuffle_merged_datasets": holds("rows are shuffled from the seed"),
    "dataset_processes": holds("automatic"),
    "train_on_inputs": to("data.train_on", prompts_too),
    "roles_to_train": to("data.train_on", roles),
    "train_on_eos": to("data.train_on_end", choice(turn="all", last="last", none="none")),
    "gradient_checkpointing_kwargs": holds("one kind, not reentrant"),
    "auto_resume_from_checkpoints": holds("checkpoint.resume is auto"),
    "resume_from_checkpoint": holds("checkpoint.resume is auto: same output_dir, same command"),
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "fsdp_version": _SHARDED,
    "ddp_timeout": holds("10 minutes"),
    "local_rank": holds("set by the launcher"),
    "dataloader_num_workers": holds("rows are tokenised before training"),
    "dataloader_pin_memory": holds("automatic"),
    "dataloader_prefetch_factor": holds("rows are tokenised before training"),
    "remove_unused_columns": holds("never matters"),
    "liger_rms_norm": holds("own kernels"),
    "liger_fused_linear_cross_entropy": holds("the loss never forms all logits"),
    "liger_glu_activation": holds("own kernels"),
    "liger_rope": holds("own kernels"),
    "lora_mlp_kernel": holds("own kernels"),
    "lora_qkv_kernel": holds("own kernels"),
    "lora_o_kernel": holds("own kernels"),
    "cut_cross_entropy": holds("the loss never forms all logits"),
    "trust_remote_code": lost("code of a repository is never run"),
    "load_in_8bit": to("model.quantize", lambda on: "int8" if on else None),
    "load_in_4bit": to("model.quantize", lambda on: "nf4" if on else None),
    "gptq": holds("read from config.json"),
    "fp16": lost("bf16 is used; dtype: fp32 is there"),
    "float16": lost("bf16 is used; dtype: fp32 is there"),
    "lora_fan_in_fan_out": lost("only for GPT-2's transposed layers"),
    "lora_on_cpu": lost("no equivalent"),
    "chat_template_jinja": lost("put it in a file: data.template: my.jinja"),
    "tokens": to("tokenizer.add_tokens", listed),
    "neftune_noise_alpha": to("neftune", float),
    "early_stopping_patience": to("eval.patience", int),
    "plugins": lost("edit a copy of the recipe: tune cp"),
    "rl_beta": to("dpo.beta", float),
    "dpo_beta": to("dpo.beta", float),
    "dpo_label_smoothing": to("dpo.label_smoothing", float),
    "dpo_use_weighting": to("dpo.on_policy", lambda on: True if on else None),
    "rpo_alpha": to("dpo.sft", float),
    "simpo_gamma": to("dpo.gamma", float),
    "kto_desirable_weight": to("dpo.desirable", float),
    "kto_undesirable_weight": to("dpo.undesirable", float),
    "orpo_alpha": lost("orpo has no constant here"),
    "cpo_alpha": lost("dpo.sft weighs the chosen answer"),
    "trl": lost("reinforcement learning is a recipe of its own: recipes/grpo.py"),
    "wandb_project": to("log.project", lambda name: name or None),
    "wandb_name": to("log.name", lambda name: name or None),
    "wandb_entity": _TRACKER,
    "wandb_log_model": _TRACKER,
    "wandb_watch": _TRACKER,
    "wandb_run_id": _TRACKER,
    "mlflow_tracking_uri": _TRACKER,
    "mlflow_experiment_name": to("log.project", lambda name: name or None),
    "comet_project_name": _TRACKER,
    "hub_model_id": lost("upload the result: tune push"),
    "hub_strategy": lost("upload the result: tune push"),
    "push_dataset_to_hub": lost("no equivalent"),
    "streaming": lost("rows are read before training"),
    "debug": lost("tune preview shows rows"),
    "save_safetensors": holds("always"),
    "save_strategy": holds("checkpoint.every"),
    "eval_strategy": holds("eval.every"),
    "evaluation_strategy": holds("eval.every"),
    "save_first_step": lost("checkpoint.every=1"),
}
TOGETHER = {
    "adapter": "picks the recipe: lora is lora_sft, none is full_sft; qlora adds model.quantize: nf4",
    "datasets": "data.sources",
    "test_datasets": "data.eval",
    "pretraining_dataset": "data.sources, and the recipe pretrain",
    "revision_of_model": "model.path: org/name@revision",
    "micro_batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows = micro_batch_size x gradient_accumulation_steps x devices",
    "batch_size": "batch.rows",
    "optimizer": "optim.name; AdamW of 8 or 4 bits: optim.states",
    "relora": "with jagged_restart_steps: relora.every",
    "jagged_restart_steps": "relora.every",
    "jagged_restart_warmup_steps": "relora.warmup_steps; left out it is 10 there",
    "relora_prune_ratio": "relora.keep = 1 - relora_prune_ratio; left out it is 0.9 there",
    "relora_prune_method": "magnitude; reset is relora.keep=0",
    "adam_beta1": "optim.betas[0]",
    "adam_beta2": "optim.betas[1]",
    "rl": "picks the recipe: dpo, ipo, simpo, orpo, kto are recipes/dpo.py with dpo.loss",
    "special_tokens": "pad_token is tokenizer.pad_token; others: change the tokenizer's files",
    "use_tensorboard": "log.to",
    "use_wandb": "log.to",
    "use_mlflow": "log.to",
    "warmup_ratio": "schedule.warmup_steps = warmup_ratio x steps, where steps is set",
    "evals_per_epoch": "eval.every counts steps",
    "saves_per_epoch": "checkpoint.every counts steps",
}
_TYPES = {
    "chat_template": "messages",
    "sharegpt": "messages",
    "messages": "messages",
    "alpaca": "alpaca",
    "completion": "text",
    "pretrain": "text",
    "text": "text",
}
_FIELDS = {
    "field_messages": "messages",
    "field": "text",
    "text_column": "text",
    "message_field_role": "role",
    "message_field_content": "content",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
}
_PLAIN = ("path", "ds_type", "type", "split", "data_files", "roles", "message_property_mappings", "chat_template")


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, sources, batch, betas, warm-up."""
    adapter = theirs.get("adapter")
    made.recipe = "pretrain" if theirs.get("pretraining_dataset") else "lora_sft" if adapter else "full_sft"
    if adapter == "qlora":
        made.set("model.quantize", "nf4")
    elif adapter not in (None, "", "lora"):
        made.lost.append(("adapter", f"{adapter!r}: lora or qlora"))
    datasets = theirs.get("pretraining_dataset") or theirs.get("datasets") or []
    datasets = [{"path": datasets, "type": "completion"}] if isinstance(datasets, str) else datasets
    made.set("data.sources", [_source(entry, f"datasets[{i}]", made) for i, entry in enumerate(datasets)])
    if theirs.get("test_datasets"):
        made.set("data.eval", [_source(e, f"test_datasets[{i}]", made) for i, e in enumerate(theirs["test_datasets"])])
    if theirs.get("revision_of_model"):
        made.set("model.path", f"{theirs.get('base_model')}@{theirs['revision_of_model']}")
    rows_of(made, theirs.get("micro_batch_size"), theirs.get("gradient_accumulation_steps"))
    optimizer(made, "optimizer", theirs.get("optimizer") or "adamw")
    _more(theirs, made)
    _relora(theirs, made)
    shares(theirs, made, "warmup_ratio", "schedule.warmup_steps")
    _left_out(theirs, made)
    for key, ours in (("evals_per_epoch", "eval.every"), ("saves_per_epoch", "checkpoint.every")):
        if theirs.get(key):
            made.lost.append((key, f"{ours} counts steps"))


def _left_out(theirs: dict[str, Any], made: Imported) -> None:
    """What Axolotl does where a key is absent: no packing, documents of 512 tokens, 3 % warm-up, …"""
    betas(theirs, made)
    if made.recipe == "pretrain":
        made.default("data.overlong", "split")
    else:
        made.default("data.pack", False)
    made.default("data.seq_len", 512)
    made.default("seed", 42)
    if theirs.get("max_grad_norm") == 0:  # Hugging Face's trainer reads it as no clipping
        made.set("optim.max_grad_norm", None)
    if theirs.get("fp16") or theirs.get("float16"):  # named as lost: bf16 is nearest
        made.set("dtype", "bf16")
    if theirs.get("warmup_steps") is None and theirs.get("warmup_ratio") is None:
        if made.get("steps"):
            made.default("schedule.warmup_steps", min(int(0.03 * made.get("steps")), 100))
        else:
            made.notes.append("no warm-up is named: 3 % of the steps there, at most 100; schedule.warmup_steps here")


def _more(theirs: dict[str, Any], made: Imported) -> None:
    """Preferences, trackers, special tokens."""
    losses = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"}
    if theirs.get("rl") in losses:
        preferences(made, losses[theirs["rl"]], adapter=bool(theirs.get("adapter")))
    elif theirs.get("rl"):
        made.lost.append(("rl", f"{theirs['rl']!r} has no equivalent in recipes/dpo.py; see recipes/grpo.py"))
    for tracker, keys in {
        "wandb": ("use_wandb", "wandb_project"),
        "mlflow": ("use_mlflow", "mlflow_experiment_name", "mlflow_tracking_uri"),
        "tensorboard": ("use_tensorboard",),
    }.items():
        if any(theirs.get(key) for key in keys):
            track(made, tracker)
    for name, token in (theirs.get("special_tokens") or {}).items():
        if name == "pad_token":
            made.set("tokenizer.pad_token", token)
        else:
            made.lost.append((f"special_tokens.{name}", "the tokenizer's own is used; change its files"))


def _relora(theirs: dict[str, Any], made: Imported) -> None:
    """Merges while training; restarts of the rate without them have no equivalent."""
    every = theirs.get("jagged_restart_steps")
    if not (theirs.get("relora") and every):
        alone = [key for key in ("relora", "jagged_restart_steps") if theirs.get(key)]
        made.lost += [(key, "relora.every merges and restarts, never one without the other") for key in alone]
        return
    method = theirs.get("relora_prune_method") or "magnitude"
    if method not in ("magnitude", "reset"):
        made.lost.append(("relora_prune_method", f"{method!r}: moments are pruned by magnitude"))
    ratio = 1.0 if method == "reset" else float(theirs.get("relora_prune_ratio") or 0.9)
    made.set("relora.every", every)
    made.set("relora.warmup_steps", theirs.get("jagged_restart_warmup_steps") or 10)
    made.set("relora.keep", round(1 - ratio, 9))


def shares(theirs: dict[str, Any], made: Imported, key: str, ours: str) -> None:
    """A share of all steps as their number."""
    if theirs.get(key) and made.get("steps"):
        made.set(ours, round(theirs[key] * made.get("steps")))
    elif theirs.get(key):
        made.lost.append((key, f"{ours} counts steps: set it to {theirs[key]:g} x steps"))


def _source(entry: dict[str, Any], key: str, made: Imported) -> dict[str, Any]:
    files = listed(entry.get("data_files") or [])
    source: dict[str, Any] = {"path": files[0] if files else entry.get("path")}
    if len(files) > 1:
        made.lost.append((f"{key}.data_files", "name each file as a source of its own"))
    kind = entry.get("type")
    if isinstance(kind, dict):
        entry = {**entry, **kind}
    elif kind is not None:
        name = str(kind).split(".")[0]
        if name in _TYPES:
            source["format"] = _TYPES[name]
        else:
            made.lost.append((f"{key}.type", f"{kind!r} has no equivalent; the format is told from the columns"))
    columns = {ours: entry[name] for name, ours in _FIELDS.items() if isinstance(entry.get(name), str)}
    columns |= {k: v for k, v in (entry.get("message_property_mappings") or {}).items() if k in ("role", "content")}
    columns = {ours: name for ours, name in columns.items() if ours != name}
    if columns:
        source["columns"] = columns
    if entry.get("roles"):
        source["roles"] = {name: ours for ours, names in entry["roles"].items() for name in listed(names)}
    if entry.get("split") and entry["split"] != "train":
        source["split"] = entry["split"]
    made.lost += [
        (f"{key}.{name}", "not a key that is known here")
        for name in entry
        if name not in _FIELDS and name not in _PLAIN and entry[name] is not None
    ]
    return source


AXOLOTL = Library("Axolotl", ("base_model",), RULES, TOGETHER, finish)
