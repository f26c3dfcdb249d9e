"""torchtune: sections with `_component_: dotted.path`. The path is read as a name, nothing of it is imported."""

from typing import Any

from ftlib.config.imports.rules import (
    Imported,
    Library,
    holds,
    listed,
    lost,
    optimizer,
    precision,
    preferences,
    prompts_too,
    recompute,
    rows_of,
    schedule,
    to,
    track,
)

_KERNELS = holds("the loss never forms all logits")

RULES = {
    "model.lora_rank": to("lora.rank"),
    "model.lora_alpha": to("lora.alpha", float),
    "model.lora_dropout": to("lora.dropout", float),
    "model.use_dora": to("lora.dora"),
    "tokenizer.max_seq_len": to("data.seq_len"),
    "tokenizer.prompt_template": lost("data.template takes a .jinja file"),
    "dataset.packed": to("data.pack"),
    "epochs": to("epochs", float),
    "max_steps_per_epoch": to("steps", note="times epochs: steps of the whole run"),
    "optimizer.lr": to("optim.lr", float),
    "optimizer.weight_decay": to("optim.weight_decay", float),
    "optimizer.betas": to("optim.betas", lambda betas: [float(beta) for beta in betas]),
    "optimizer.eps": to("optim.eps", float),
    "clip_grad_norm": to("optim.max_grad_norm", float),
    "lr_scheduler.num_warmup_steps": to("schedule.warmup_steps"),
    "lr_scheduler._component_": to(
        "schedule.name",
        lambda path: schedule(path.rpartition(".")[2].removeprefix("get_").removesuffix("_schedule_with_warmup")),
    ),
    "dtype": to("dtype", precision),
    "enable_activation_checkpointing": to("memory.recompute", recompute),
    "enable_activation_offloading": to("memory.offload"),
    "compile": to("memory.compile"),
    "log_every_n_steps": to("log.every"),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "save_every_n_steps": to("checkpoint.every"),
    "keep_last_n_checkpoints": to("checkpoint.keep"),
    "run_val_every_n_steps": to("eval.every"),
    "tensor_parallel_dim": to("parallel.tp"),
    "context_parallel_dim": to("parallel.cp"),
    "data_parallel_shard_dim": to("parallel.dp_shard"),
    "data_parallel_replicate_dim": to("parallel.dp_replicate"),
    "tokenizer._component_": holds("told from the tokenizer's files"),
    "checkpointer._component_": holds("Hugging Face folders are read and written"),
    "checkpointer.checkpoint_files": holds("read from the folder"),
    "checkpointer.model_type": holds("read from config.json"),
    "checkpointer.output_dir": holds("output_dir"),
    "checkpointer.recipe_checkpoint": holds("checkpoint.resume is auto"),
    "checkpointer.adapter_checkpoint": holds("checkpoint.resume is auto"),
    "resume_from_checkpoint": holds("checkpoint.resume is auto: same output_dir, same command"),
    "save_adapter_weights_only": holds("lora_sft writes the adapter"),
    "loss.beta": to("dpo.beta", float),
    "loss.label_smoothing": to("dpo.label_smoothing", lambda share: float(share) or None),
    "loss.num_output_chunks": _KERNELS,
    "device": holds("the GPU if there is one"),
    "shuffle": holds("rows are shuffled"),
    "optimizer.fused": holds("automatic"),
    "optimizer_in_bwd": lost("the optimizer steps after the backward pass"),
    "custom_sharded_layers": holds("every block is sharded"),
    "fsdp_cpu_offload": lost("memory.offload is for activations"),
    "fsdp_reshard_after_forward": holds("blocks are resharded"),
    "log_peak_memory_stats": holds("metrics.jsonl has it"),
    "log_level": lost("no equivalent"),
    "metric_logger.log_dir": holds("output_dir"),
    "metric_logger.project": to("log.project"),
    "model.quantize_base": to("model.quantize", lambda on: "nf4" if on else None),
    "enable_async_checkpointing": lost("a save is finished before training goes on"),
    "cudnn_deterministic_mode": to("deterministic", bool),
    "metric_logger.name": to("log.name"),
}
TOGETHER = {
    "model._component_": "picks the recipe: lora_… is lora_sft, others full_sft; qlora_… adds model.quantize: nf4",
    "model.lora_attn_modules": "lora.targets",
    "model.apply_lora_to_mlp": "lora.targets: gate_proj, up_proj, down_proj",
    "model.apply_lora_to_output": "lora.targets: lm_head",
    "checkpointer.checkpoint_dir": "model.path",
    "tokenizer.path": "model.path has it; tokenizer.path",
    "tokenizer.merges_file": "model.path has it; tokenizer.path",
    "dataset._component_": "data.sources[].format",
    "dataset.source": "data.sources[].path",
    "dataset.data_files": "data.sources[].path",
    "dataset.split": "data.sources[].split",
    "dataset.column_map": "data.sources[].columns",
    "dataset.conversation_column": "data.sources[].columns",
    "dataset.conversation_style": "told from the rows",
    "dataset.column": "data.sources[].columns",
    "dataset.train_on_input": "data.train_on",
    "dataset.new_system_prompt": "write it in the rows",
    "dataset_val._component_": "data.eval",
    "dataset_val.source": "data.eval",
    "dataset_val.data_files": "data.eval",
    "dataset_val.split": "data.eval",
    "batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows = batch_size x gradient_accumulation_steps x devices",
    "optimizer._component_": "optim.name; AdamW of 8 or 4 bits: optim.states",
    "loss._component_": "DPOLoss is recipes/dpo.py; of others the loss never forms all logits",
    "metric_logger._component_": "log.to",
}
_FORMATS = {
    "alpaca_dataset": "alpaca",
    "alpaca_cleaned_dataset": "alpaca",
    "instruct_dataset": "alpaca",
    "chat_dataset": "messages",
    "text_completion_dataset": "text",
    "slimorca_dataset": "messages",
}
_LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}
_PREFERENCES = ("preference_dataset", "stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset")
_OURS = {"instruction": "instruction", "input": "input", "output": "output"}


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, model, targets, sources, batch, optimizer."""
    component = str(theirs.get("model._component_", "")).rpartition(".")[2]
    made.recipe = "lora_sft" if component.startswith(("lora_", "qlora_", "dora_")) else "full_sft"
    if component.startswith("qlora_"):
        made.set("model.quantize", "nf4")
    if str(theirs.get("loss._component_", "")).endswith("DPOLoss"):
        preferences(made, "sigmoid", adapter=made.recipe == "lora_sft")
    logger = str(theirs.get("metric_logger._component_", "")).rpartition(".")[2]
    if logger in _LOGGERS:
        track(made, _LOGGERS[logger])
    elif logger not in ("", "DiskLogger", "StdoutLogger"):
        made.lost.append(("metric_logger._component_", f"{logger!r} has no equivalent; log.to names trackers"))
    made.set("model.path", str(theirs.get("checkpointer.checkpoint_dir", "")).rstrip("/"))
    targets = [
        {"output_proj": "o_proj"}.get(name, name) for name in listed(theirs.get("model.lora_attn_modules") or [])
    ]
    targets += ["gate_proj", "up_proj", "down_proj"] if theirs.get("model.apply_lora_to_mlp") else []
    targets += ["lm_head"] if theirs.get("model.apply_lora_to_output") else []
    if targets and component.startswith(("lora_", "qlora_", "dora_")):
        made.set("lora.targets", targets)
    made.set("data.sources", [_source(theirs, "dataset", made)])
    if theirs.get("dataset_val._component_"):
        made.set("data.eval", [_source(theirs, "dataset_val", made)])
    if theirs.get("dataset.new_system_prompt"):
        made.lost.append(("dataset.new_system_prompt", "write it in the rows"))
    rows_of(made, theirs.get("batch_size"), theirs.get("gradient_accumulation_steps"))
    named = str(theirs.get("optimizer._component_", "AdamW")).rpartition(".")[2]
    optimizer(made, "optimizer._component_", named)
    _left_out(theirs, made, adapter=component.startswith(("lora_", "qlora_", "dora_")), adamw="adamw" in named.lower())


def _left_out(theirs: dict[str, Any], made: Imported, adapter: bool, adamw: bool) -> None:
    """What torchtune's builders and torch's AdamW do where a key is absent: no packing, no clipping, decay 0.01, …"""
    made.default("data.pack", False)
    made.default("data.overlong", "drop" if made.get("data.pack") else "truncate")
    alpaca = str(theirs.get("dataset._component_", "")).endswith(("alpaca_dataset", "alpaca_cleaned_dataset"))
    if theirs.get("dataset.train_on_input"):
        made.set("data.train_on", prompts_too(True))
    elif alpaca and theirs.get("dataset.train_on_input") is None:
        made.default("data.train_on", prompts_too(True))
    if adapter:
        made.default("lora.rank", 8)
        made.default("lora.alpha", 16.0)
    if adamw:
        made.default("optim.lr", 1e-3)
        made.default("optim.betas", [0.9, 0.999])
        made.default("optim.weight_decay", 0.01)
    made.default("optim.max_grad_norm", None)
    if theirs.get("lr_scheduler._component_") is None:
        made.default("schedule.name", "constant")
    made.default("schedule.warmup_steps", 0)
    if made.get("steps"):
        made.set("steps", round(made.get("steps") * made.get("epochs", 1.0)))


def _source(theirs: dict[str, Any], key: str, made: Imported) -> dict[str, Any]:
    entry = {name.removeprefix(f"{key}."): value for name, value in theirs.items() if name.startswith(f"{key}.")}
    kind = str(entry.get("_component_", "")).rpartition(".")[2]
    source: dict[str, Any] = {
        "path": entry.get("data_files") or entry.get("source") or {"alpaca_dataset": "tatsu-lab/alpaca"}.get(kind)
    }
    if kind in _FORMATS:
        source["format"] = _FORMATS[kind]
    elif kind and kind not in _PREFERENCES:
        made.lost.append((f"{key}._component_", f"{kind!r} has no equivalent; the format is told from the columns"))
    columns = {k: v for k, v in (entry.get("column_map") or {}).items() if k in _OURS and k != v}
    if entry.get("conversation_column") not in (None, "messages", "conversations"):
        columns["messages"] = entry["conversation_column"]
    if entry.get("column") not in (None, "text"):
        columns["text"] = entry["column"]
    if columns:
        source["columns"] = columns
    if entry.get("split") not in (None, "train"):
        source["split"] = (
            entry["split"].removeprefix("train") if str(entry["split"]).startswith("train[") else entry["split"]
        )
    return source


TORCHTUNE = Library(
    "torchtune", ("model._component_", "checkpointer._component_"), RULES, TOGETHER, finish, ("profiler",)
)
