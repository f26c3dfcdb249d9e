"""torchtune: sections with `_component_: dotted.path`. The path is read as a name, nothing of it is imported."""

from dataclasses import dataclass, field
from typing import Any

from ftlib.config.imports.rules import (
    Imported,
    Library,
    adapter,
    choice,
    holds,
    listed,
    lost,
    offload_states,
    optimizer,
    precision,
    preferences,
    prompts_too,
    recompute,
    refused,
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
        lambda path: schedule(str(path).rpartition(".")[2].removeprefix("get_").removesuffix("_schedule_with_warmup")),
    ),
    "dtype": to("dtype", precision),
    "enable_activation_checkpointing": to("memory.recompute", recompute),
    "enable_activation_offloading": to("memory.offload"),
    "ac_mode": to("memory.recompute", choice(none="none", selective="selective", full="full")),
    "ac_option": holds("memory.recompute: selective chooses operations, not every so many blocks"),
    "memory_efficient_fsdp_wrap": holds("every block is sharded"),
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
    "loss.num_output_chunks": _KERNELS,
    "device": holds("the GPU if there is one"),
    "shuffle": holds("rows are shuffled"),
    "optimizer.fused": holds("automatic"),
    "optimizer_in_bwd": to("optim.in_backward"),
    "custom_sharded_layers": holds("every block is sharded"),
    "fsdp_reshard_after_forward": holds("blocks are resharded"),
    "log_peak_memory_stats": holds("metrics.jsonl has it"),
    "log_level": lost("no equivalent"),
    "metric_logger.log_dir": holds("output_dir"),
    "metric_logger.project": to("log.project"),
    "model.quantize_base": to("model.quantize", lambda on: "nf4" if on else None),
    "enable_async_checkpointing": to("checkpoint.background"),
    "fake_quant_after_n_steps": to("qat.after"),
    "profiler.enabled": to("profile", lambda on: True if on else None),
    "kd_ratio": to("distill.hard", lambda share: round(1 - float(share), 9), "1 - kd_ratio"),
    "teacher_model._component_": holds("distill.teacher is a folder: its config.json says"),
    "teacher_checkpointer._component_": holds("distill.teacher is a folder"),
    "teacher_checkpointer.checkpoint_files": holds("read from the folder"),
    "teacher_checkpointer.model_type": holds("read from config.json"),
    "teacher_checkpointer.output_dir": holds("output_dir"),
    "teacher_checkpointer.recipe_checkpoint": holds("checkpoint.resume is auto"),
    "cudnn_deterministic_mode": to("deterministic", bool),
    "metric_logger.name": to("log.name"),
}
TOGETHER = {
    "model._component_": "picks the recipe: lora_… is lora_sft, others full_sft; qlora_… adds model.quantize: nf4",
    "model.lora_attn_modules": "lora.targets",
    "model.apply_lora_to_mlp": "lora.targets: gate_proj, up_proj, down_proj",
    "model.apply_lora_to_output": "none: the head has no adapter; lora.modules_to_save=[lm_head] trains it whole",
    "fsdp_cpu_offload": "optim.offload: the optimizer's state",
    "enable_fp8_training": "model.fp8",
    "fp8_recipe_name": "model.fp8: tensorwise or rowwise",
    "quantizer._component_": "qat.scheme",
    "quantizer.groupsize": "qat.group",
    "teacher_checkpointer.checkpoint_dir": "distill.teacher, and the recipe distill",
    "kd_loss._component_": "distill.divergence",
    "dataset": "a list of datasets: data.sources",
    "checkpointer.checkpoint_dir": "model.path",
    "tokenizer.path": "model.path has it; tokenizer.path",
    "tokenizer.merges_file": "model.path has it; tokenizer.path",
    "dataset._component_": "data.sources[].format, and where it names its own data data.sources[].path",
    "dataset.source": "data.sources[].path",
    "dataset.name": "data.sources[].subset",
    "dataset.subset": "data.sources[].subset",
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
    "loss.beta": "dpo.beta",
    "loss.label_smoothing": "dpo.label_smoothing, with dpo.loss cdpo",
    "loss._component_": "DPOLoss is recipes/dpo.py; of others the loss never forms all logits",
    "metric_logger._component_": "log.to",
}


@dataclass(frozen=True)
class Builder:
    """What one of torchtune's functions that build a dataset reads where the config names nothing else."""

    format: str | None = None  # null: told from the columns
    path: str | None = None  # null: the config names it
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None


_BUILDERS = {
    "alpaca_dataset": Builder("alpaca", "tatsu-lab/alpaca"),
    "alpaca_cleaned_dataset": Builder("alpaca", "yahma/alpaca-cleaned"),
    "instruct_dataset": Builder("qa", columns={"question": "input", "answer": "output"}),
    "grammar_dataset": Builder("qa", "liweili/c4_200m", {"question": "input", "answer": "output"}),
    "samsum_dataset": Builder("qa", "Samsung/samsum", {"question": "dialogue", "answer": "summary"}),
    "chat_dataset": Builder("messages"),
    "slimorca_dataset": Builder("messages", "Open-Orca/SlimOrca-Dedup"),
    "text_completion_dataset": Builder("text"),
    "cnn_dailymail_articles_dataset": Builder("text", "ccdv/cnn_dailymail", {"text": "article"}, "3.0.0"),
    "wikitext_dataset": Builder("text", "EleutherAI/wikitext_document_level", {"text": "page"}, "wikitext-103-raw-v1"),
    "preference_dataset": Builder(),
    "hh_rlhf_helpful_dataset": Builder(None, "RLHFlow/HH-RLHF-Helpful-standard"),
    "stack_exchange_paired_dataset": Builder(
        None, "lvwerra/stack-exchange-paired",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
}  # fmt: skip
_LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}
_DIVERGENCES = {"ForwardKL": "forward_kl", "ReverseKL": "reverse_kl"}
_INSTRUCTED = {"input": "question", "output": "answer"}  # names of instruct_dataset's columns; of alpaca they are ours


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, model, targets, sources, batch, optimizer."""
    component = str(theirs.get("model._component_", "")).rpartition(".")[2]
    peft = component.startswith(("lora_", "qlora_", "dora_"))
    _recipe(theirs, made, peft)
    if component.startswith("qlora_"):
        made.set("model.quantize", "nf4")
    logger = str(theirs.get("metric_logger._component_", "")).rpartition(".")[2]
    if logger in _LOGGERS:
        track(made, _LOGGERS[logger])
    elif logger not in ("", "DiskLogger", "StdoutLogger"):
        made.lost.append(("metric_logger._component_", f"{logger!r} has no equivalent; log.to names trackers"))
    made.set("model.path", str(theirs.get("checkpointer.checkpoint_dir", "")).rstrip("/"))
    if peft:
        _targets(theirs, made)
    if sources := _sources(theirs, "dataset", made):
        made.set("data.sources", sources)
    if held_out := _sources(theirs, "dataset_val", made):
        made.set("data.eval", held_out)
    rows_of(made, theirs.get("batch_size"), theirs.get("gradient_accumulation_steps"))
    named = str(theirs.get("optimizer._component_", "AdamW")).rpartition(".")[2]
    optimizer(made, "optimizer._component_", named)
    if theirs.get("fsdp_cpu_offload"):
        offload_states(made, "fsdp_cpu_offload")
    _low_precision(theirs, made)
    adapter(made, on=peft)
    _left_out(theirs, made, adapter=peft, adamw="adamw" in named.lower())


def _recipe(theirs: dict[str, Any], made: Imported, peft: bool) -> None:
    """What is trained: torchtune has a script for each kind, which the losses and the teacher tell."""
    made.recipe = "lora_sft" if peft else "full_sft"
    loss = str(theirs.get("loss._component_", "")).rpartition(".")[2]
    if loss == "DPOLoss":
        preferences(made, "sigmoid", beta=theirs.get("loss.beta"),
                    label_smoothing=theirs.get("loss.label_smoothing") or None)  # fmt: skip
    elif loss in ("GRPOLoss", "GRPOSimpleLoss", "GRPOWithChunkedOutputLoss", "PPOLoss"):
        raise refused("loss", loss, "recipes/grpo.py, whose config is too different to be made from this one")
    elif theirs.get("teacher_checkpointer.checkpoint_dir"):
        made.recipe = "distill"
        made.set("distill.teacher", str(theirs["teacher_checkpointer.checkpoint_dir"]).rstrip("/"))
        made.default("distill.hard", 0.5)
        divergence = str(theirs.get("kd_loss._component_", "ForwardKL")).rpartition(".")[2]
        ours = next((value for name, value in _DIVERGENCES.items() if divergence.startswith(name)), None)
        if ours:
            made.set("distill.divergence", ours)
        else:
            made.lost.append(("kd_loss._component_", f"{divergence}: forward_kl, reverse_kl and js are there"))


def _targets(theirs: dict[str, Any], made: Imported) -> None:
    names = [{"output_proj": "o_proj"}.get(name, name) for name in listed(theirs.get("model.lora_attn_modules") or [])]
    names += ["gate_proj", "up_proj", "down_proj"] if theirs.get("model.apply_lora_to_mlp") else []
    if names:
        made.set("lora.targets", names)
    if theirs.get("model.apply_lora_to_output"):
        why = "the head has no adapter here; lora.modules_to_save=[lm_head] trains it whole"
        made.lost.append(("model.apply_lora_to_output", why))


def _low_precision(theirs: dict[str, Any], made: Imported) -> None:
    """Products in 8-bit floats, and training for a result that is rounded."""
    if theirs.get("enable_fp8_training"):
        named = str(theirs.get("fp8_recipe_name") or "tensorwise")
        made.set("model.fp8", "rowwise" if named.startswith("rowwise") else "tensorwise")
    quantizer = str(theirs.get("quantizer._component_", "")).rpartition(".")[2]
    if quantizer and "QAT" not in quantizer:
        made.lost.append(("quantizer._component_", f"{quantizer} is for after training: recipes/quantize.py"))
        made.drop("qat")
    elif quantizer:
        scheme = "int8_int4" if quantizer.startswith("Int8DynActInt4") else "int4" if "Int4" in quantizer else "fp8"
        made.set("qat.scheme", scheme)
        if theirs.get("quantizer.groupsize") and scheme != "fp8":
            made.set("qat.group", theirs["quantizer.groupsize"])


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
    if made.get("optim.in_backward") and made.get("batch.rows") != made.get("batch.micro_rows"):
        made.lost.append(
            ("optimizer_in_bwd", "with gradient_accumulation_steps there is a sum of gradients to wait for")
        )
        made.drop("optim.in_backward")
    if theirs.get("lr_scheduler._component_") is None:
        made.default("schedule.name", "constant")
    made.default("schedule.warmup_steps", 0)
    if made.get("steps"):
        made.set("steps", round(made.get("steps") * made.get("epochs", 1.0)))


def _sources(theirs: dict[str, Any], key: str, made: Imported) -> list[dict[str, Any]]:
    """One dataset, whose keys have been opened, or a list of them."""
    opened = {name.removeprefix(f"{key}."): value for name, value in theirs.items() if name.startswith(f"{key}.")}
    entries = theirs[key] if isinstance(theirs.get(key), list) else [opened] if opened.get("_component_") else []
    return [source for entry in entries if (source := _source(entry, key, made))]


def _source(entry: dict[str, Any], key: str, made: Imported) -> dict[str, Any] | None:
    """What the builder reads, or what the entry names instead; nothing where neither says it."""
    kind = str(entry.get("_component_", "")).rpartition(".")[2]
    builder = _BUILDERS.get(kind, Builder())
    files = listed(entry.get("data_files") or [])
    path = files[0] if files else entry.get("source") or builder.path
    if path is None:
        made.lost.append((f"{key}._component_", f"{kind} names no data that is known here: write data.sources"))
        return None
    if kind not in _BUILDERS:
        made.lost.append((f"{key}._component_", f"{kind!r} has no equivalent; the format is told from the columns"))
    source: dict[str, Any] = {"path": path}
    if builder.format:
        source["format"] = builder.format
    renamed = _INSTRUCTED if builder.format == "qa" else {}
    columns = {**builder.columns, **{renamed.get(ours, ours): c for ours, c in (entry.get("column_map") or {}).items()}}
    if entry.get("conversation_column") not in (None, "messages", "conversations"):
        columns["messages"] = entry["conversation_column"]
    if entry.get("column"):
        columns["text"] = entry["column"]
    columns = {ours: column for ours, column in columns.items() if ours != column}
    if columns:
        source["columns"] = columns
    if subset := entry.get("name") or entry.get("subset") or builder.subset:
        source["subset"] = subset
    split = str(entry.get("split") or "train")
    if split != "train":
        source["split"] = split.removeprefix("train") if split.startswith("train[") else split
    if entry.get("new_system_prompt"):
        made.lost.append((f"{key}.new_system_prompt", "write it in the rows"))
    return source


TORCHTUNE = Library(
    "torchtune", ("model._component_", "checkpointer._component_"), RULES, TOGETHER, finish, ("profiler",)
)
