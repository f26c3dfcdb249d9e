"""LLaMA-Factory: flat keys, the arguments of its `train`."""

import json
from pathlib import Path
from typing import Any

from ftlib.config.imports.axolotl import shares
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
    rows_of,
    schedule,
    to,
)

_AUTO = holds("the fastest that is right is chosen: model.attention")
_LOSSES = choice(sigmoid="sigmoid", hinge="hinge", ipo="ipo", orpo="orpo", simpo="simpo", kto_pair=None)
_TEMPLATES = choice(
    default=None, empty=None, qwen=None, qwen3=None, llama2=None, llama3=None, mistral=None, chatml="chatml"
)


def _trackers(value: Any) -> list[str] | None:
    names = [name for name in listed(value) if name != "none"]
    find = choice(wandb="wandb", tensorboard="tensorboard", mlflow="mlflow")
    return ["console", *(find(name) for name in names)] if names else None


RULES = {
    "model_name_or_path": to("model.path"),
    "adapter_name_or_path": to("lora.start_from"),
    "lora_rank": to("lora.rank"),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "lora_target": to("lora.targets", lambda names: "all-linear" if names == "all" else listed(names)),
    "additional_target": to("lora.modules_to_save", listed),
    "use_rslora": to("lora.rslora"),
    "use_dora": to("lora.dora"),
    "loraplus_lr_ratio": to("lora.lr_ratio", float),
    "pissa_init": to("lora.init", lambda on: "pissa" if on else None),
    "cutoff_len": to("data.seq_len"),
    "packing": to("data.pack"),
    "template": to("data.template", _TEMPLATES, "the tokenizer's own; chatml by name"),
    "val_size": to("data.eval", lambda size: float(size) if size else None),
    "num_train_epochs": to("epochs", float),
    "max_steps": to("steps", lambda steps: steps if steps > 0 else None),
    "learning_rate": to("optim.lr", float),
    "weight_decay": to("optim.weight_decay", float),
    "adam_epsilon": to("optim.eps", float),
    "max_grad_norm": to("optim.max_grad_norm", lambda norm: float(norm) or None),
    "lr_scheduler_type": to("schedule.name", schedule),
    "warmup_steps": to("schedule.warmup_steps"),
    "bf16": to("dtype", precision),
    "disable_gradient_checkpointing": to("memory.recompute", lambda off: "none" if off else "full"),
    "gradient_checkpointing": to("memory.recompute", recompute),
    "torch_compile": to("memory.compile"),
    "logging_steps": to("log.every"),
    "eval_steps": to("eval.every", int),
    "save_steps": to("checkpoint.every", int),
    "save_total_limit": to("checkpoint.keep"),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "do_train": holds("tune run trains"),
    "do_eval": holds("data.eval is evaluated"),
    "flash_attn": _AUTO,
    "dataset_dir": holds("looked at for dataset_info.json"),
    "eval_strategy": holds("eval.every"),
    "evaluation_strategy": holds("eval.every"),
    "save_strategy": holds("checkpoint.every"),
    "preprocessing_num_workers": holds("automatic"),
    "dataloader_num_workers": holds("rows are tokenised before training"),
    "overwrite_cache": holds("the cache knows what it was made of"),
    "tokenized_path": holds("cached by itself"),
    "overwrite_output_dir": holds("checkpoint.resume: never starts over"),
    "per_device_eval_batch_size": holds("batch.micro_rows"),
    "resume_from_checkpoint": holds("checkpoint.resume is auto: same output_dir, same command"),
    "plot_loss": holds("metrics.jsonl has every step"),
    "ddp_timeout": holds("10 minutes"),
    "deepspeed": holds("more than one process shards by itself: parallel.dp_shard"),
    "fsdp": holds("more than one process shards by itself: parallel.dp_shard"),
    "neat_packing": to("data.pack", lambda on: True if on else None, "packed rows never mix"),
    "use_fast_tokenizer": holds("told from the tokenizer's files"),
    "enable_liger_kernel": holds("own kernels"),
    "ddp_find_unused_parameters": holds("never needed"),
    "pure_bf16": to("dtype", lambda on: "bf16" if on else None),
    "save_only_model": holds("final/"),
    "trust_remote_code": lost("code of a repository is never run"),
    "fp16": lost("bf16 is used; dtype: fp32 is there"),
    "quantization_bit": to("model.quantize", lambda bits: choice(**{"4": "nf4", "8": "int8"})(bits)),
    "quantization_method": holds("quantized as it is loaded"),
    "double_quantization": holds("nf4 always is"),
    "train_on_prompt": to("data.train_on", prompts_too),
    "mask_history": lost("every answer is trained"),
    "neftune_noise_alpha": to("neftune", float),
    "freeze_trainable_layers": lost("train.only and train.freeze take patterns"),
    "use_galore": lost("adamw is used instead"),
    "use_badam": lost("adamw is used instead"),
    "rope_scaling": lost("read from config.json"),
    "shift_attn": lost("no shifted attention"),
    "use_unsloth": lost("own kernels are always used"),
    "interleave_probs": lost("data.sources[].weight"),
    "mix_strategy": lost("data.sources[].weight"),
    "report_to": to("log.to", _trackers),
    "run_name": to("log.name"),
    "export_dir": lost("tune merge"),
    "push_to_hub": lost("tune push"),
    "predict_with_generate": lost("eval.exact_match"),
    "streaming": lost("rows are read before training"),
    "resize_vocab": holds("new tokens get rows of their own"),
    "add_tokens": to("tokenizer.add_tokens", listed),
    "new_special_tokens": to("tokenizer.add_tokens", listed),
    "add_special_tokens": to("tokenizer.add_tokens", listed),
    "pref_beta": to("dpo.beta", float),
    "pref_ftx": to("dpo.sft", lambda weight: float(weight) or None),
    "simpo_gamma": to("dpo.gamma", float),
    "dpo_label_smoothing": to("dpo.label_smoothing", lambda share: float(share) or None),
    "kto_chosen_weight": to("dpo.desirable", float),
    "kto_rejected_weight": to("dpo.undesirable", float),
    "ref_model": lost("the reference is the base, or the adapter that is continued: dpo.reference"),
}
TOGETHER = {
    "stage": "picks the recipe: sft, pt is pretrain, dpo and kto are dpo",
    "pref_loss": "dpo.loss",
    "finetuning_type": "picks the recipe: lora is lora_sft, full is full_sft",
    "dataset": "data.sources, through dataset_info.json",
    "eval_dataset": "data.eval, through dataset_info.json",
    "per_device_train_batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows = per_device_train_batch_size x gradient_accumulation_steps x devices",
    "optim": "optim.name; AdamW of 8 or 4 bits: optim.states",
    "adam_beta1": "optim.betas[0]",
    "adam_beta2": "optim.betas[1]",
    "warmup_ratio": "schedule.warmup_steps = warmup_ratio x steps, where steps is set",
    "max_samples": "data.sources[].split: '[:N]'",
}


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, sources, batch, betas, warm-up."""
    stage, kind = theirs.get("stage", "sft"), theirs.get("finetuning_type", "lora")
    made.recipe = "pretrain" if stage == "pt" else "lora_sft" if kind == "lora" else "full_sft"
    if stage in ("dpo", "kto"):
        try:
            loss = "kto" if stage == "kto" else _LOSSES(theirs.get("pref_loss") or "sigmoid")
            preferences(made, loss or "sigmoid", adapter=kind == "lora")
        except ValueError as error:
            made.lost.append(("pref_loss", str(error)))
    elif stage not in ("sft", "pt"):
        made.lost.append(("stage", f"{stage!r} is a recipe of its own: tune ls"))
    if kind not in ("lora", "full"):
        made.lost.append(("finetuning_type", f"{kind!r}: lora or full; train.only and train.freeze take patterns"))
    folder = Path(theirs.get("__folder__") or ".") / str(theirs.get("dataset_dir") or "data")
    for key, ours in (("dataset", "data.sources"), ("eval_dataset", "data.eval")):
        if theirs.get(key):
            made.set(ours, [_source(name, folder, key, theirs, made) for name in listed(theirs[key])])
    rows_of(made, theirs.get("per_device_train_batch_size") or 8, theirs.get("gradient_accumulation_steps"))
    optimizer(made, "optim", theirs.get("optim") or "adamw")
    shares(theirs, made, "warmup_ratio", "schedule.warmup_steps")
    _left_out(theirs, made, adapter=kind == "lora" and stage != "pt")


def _left_out(theirs: dict[str, Any], made: Imported, adapter: bool) -> None:
    """What LLaMA-Factory, and Hugging Face's trainer below it, do where a key is absent."""
    betas(theirs, made)
    if made.recipe == "pretrain":
        made.default("data.overlong", "split")
    else:
        made.default("data.pack", False)
        made.default("data.overlong", "drop" if made.get("data.pack") else "truncate")
    if adapter:
        made.default("lora.rank", 8)
        made.default("lora.alpha", 2.0 * made.get("lora.rank"))
    if not made.get("steps"):
        made.default("epochs", 3.0)
    made.default("optim.lr", 5e-5)
    if theirs.get("lr_scheduler_type") is None:  # one without an equivalent is named as lost
        made.default("schedule.name", "linear")
    if not theirs.get("warmup_ratio"):
        made.default("schedule.warmup_steps", 0)
    if theirs.get("max_grad_norm") == 0:  # read as no clipping
        made.set("optim.max_grad_norm", None)
    if theirs.get("fp16") or theirs.get("pure_bf16"):  # fp16 is named as lost: bf16 is nearest
        made.set("dtype", "bf16")
    made.default("dtype", "fp32")
    made.default("seed", 42)


def _source(name: str, folder: Path, key: str, theirs: dict[str, Any], made: Imported) -> dict[str, Any]:
    info = folder / "dataset_info.json"
    entry = json.loads(info.read_text(encoding="utf-8")).get(name) if info.is_file() else None
    if entry is None:
        made.lost.append((key, f"{name!r} is not in {info}: put the file's path in data.sources"))
        return {"path": name}
    source: dict[str, Any] = {
        "path": str(folder / entry["file_name"]) if "file_name" in entry else entry.get("hf_hub_url", name)
    }
    if not entry.get("ranking") and "kto_tag" not in (entry.get("columns") or {}):  # those are told from the columns
        source["format"] = "messages" if entry.get("formatting") == "sharegpt" else "alpaca"
    names = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
        "messages": "messages",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
        "kto_tag": "label",
    }
    columns = {names[theirs]: ours for theirs, ours in (entry.get("columns") or {}).items() if theirs in names}
    tags = entry.get("tags") or {}
    columns |= {ours: tags[tag] for tag, ours in (("role_tag", "role"), ("content_tag", "content")) if tag in tags}
    columns = {ours: name for ours, name in columns.items() if ours != name}
    if columns:
        source["columns"] = columns
    ours = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
    roles = {tags[tag]: role for tag, role in ours.items() if tag in tags and tags[tag] != role}
    if roles:
        source["roles"] = roles
    if theirs.get("max_samples"):
        source["split"] = f"[:{theirs['max_samples']}]"
    return source


LLAMA_FACTORY = Library("LLaMA-Factory", ("model_name_or_path",), RULES, TOGETHER, finish)
