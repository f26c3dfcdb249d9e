"""LLaMA-Factory: flat keys, the arguments of its `train`."""

import json
from pathlib import Path
from typing import Any

from ftlib.config.imports import trainer
from ftlib.config.imports.rules import (
    Imported,
    Library,
    adapter,
    choice,
    held_out,
    holds,
    listed,
    lost,
    optimizer,
    preferences,
    prompts_too,
    refused,
    rows_of,
    to,
)

_AUTO = holds("the fastest that is right is chosen: model.attention")
_LOSSES = choice(sigmoid="sigmoid", hinge="hinge", ipo="ipo", orpo="orpo", simpo="simpo")
_NAMED = ("chatml", "alpaca", "vicuna", "zephyr")  # any other is of a model's family, and in its tokenizer

RULES = trainer.RULES | {
    "model_name_or_path": to("model.path"),
    "adapter_name_or_path": to("lora.start_from"),
    "fp8": to("model.fp8", lambda on: "tensorwise" if on else None),
    "use_dft_loss": to("loss.name", lambda on: "dft" if on else None),
    "use_eaft_loss": to("loss.name", lambda on: "eaft" if on else None),
    "compute_accuracy": lost("eval.exact_match"),
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
    "template": to(
        "data.template",
        lambda name: name if name in _NAMED else None,
        "chatml, alpaca … by name; else the tokenizer's own",
    ),
    "val_size": to("data.eval", held_out),
    "moe_aux_loss_coef": to("loss.router_aux", float),
    "flash_attn": _AUTO,
    "dataset_dir": holds("looked at for dataset_info.json"),
    "preprocessing_num_workers": holds("automatic"),
    "overwrite_cache": holds("the cache knows what it was made of"),
    "tokenized_path": holds("cached by itself"),
    "plot_loss": holds("metrics.jsonl has every step"),
    "neat_packing": to("data.pack", lambda on: True if on else None, "packed rows never mix"),
    "use_fast_tokenizer": holds("told from the tokenizer's files"),
    "enable_liger_kernel": holds("own kernels"),
    "pure_bf16": to("dtype", lambda on: "bf16" if on else None),
    "quantization_bit": to("model.quantize", lambda bits: choice(**{"4": "nf4", "8": "int8"})(bits)),
    "quantization_method": holds("quantized as it is loaded"),
    "double_quantization": holds("nf4 always is"),
    "train_on_prompt": to("data.train_on", prompts_too),
    "mask_history": lost("every answer is trained"),
    "freeze_trainable_layers": lost("train.only and train.freeze take patterns"),
    "use_galore": lost("adamw is used instead"),
    "use_badam": lost("adamw is used instead"),
    "rope_scaling": lost("read from config.json"),
    "shift_attn": lost("no shifted attention"),
    "use_unsloth": lost("own kernels are always used"),
    "interleave_probs": lost("data.sources[].weight"),
    "mix_strategy": lost("data.sources[].weight"),
    "export_dir": lost("tune merge"),
    "predict_with_generate": lost("eval.exact_match"),
    "resize_vocab": holds("new tokens get rows of their own"),
    "add_tokens": to("tokenizer.add_tokens", listed),
    "new_special_tokens": to("tokenizer.add_tokens", listed),
    "add_special_tokens": to("tokenizer.add_tokens", listed),
    "ref_model": lost("the reference is the base, or the adapter that is continued: dpo.reference"),
}
TOGETHER = trainer.TOGETHER | {
    "stage": "picks the recipe: sft, pt is pretrain or lora_sft on text, rm is reward, dpo and kto are dpo; no ppo",
    "pref_loss": "dpo.loss; orpo is {sft: 1, orpo: pref_beta}",
    "pref_beta": "dpo.beta; of orpo its weight in dpo.loss",
    "pref_ftx": "dpo.sft",
    "simpo_gamma": "dpo.gamma",
    "dpo_label_smoothing": "dpo.label_smoothing, with dpo.loss cdpo",
    "kto_chosen_weight": "dpo.desirable",
    "kto_rejected_weight": "dpo.undesirable",
    "gradient_checkpointing": "memory.recompute",
    "disable_gradient_checkpointing": "memory.recompute: none",
    "enable_thinking": "data.template_args, of the templates of qwen3, which read it",
    "use_muon": "optim.name: muon",
    "use_unsloth_gc": "memory.recompute: full with memory.offload",
    "streaming": "pretrain's `stream` section, which reads while it trains; the other recipes read before",
    "finetuning_type": "picks the recipe: lora is lora_sft, full is full_sft",
    "dataset": "data.sources, through dataset_info.json",
    "eval_dataset": "data.eval, through dataset_info.json",
    "max_samples": "data.sources[].split: '[:N]'",
}


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, sources, batch, optimizer, recomputation."""
    stage, kind = theirs.get("stage") or "sft", theirs.get("finetuning_type") or "lora"
    _recipe(theirs, made, stage, kind)
    if kind not in ("lora", "full"):
        made.lost.append(("finetuning_type", f"{kind!r}: lora or full; train.only and train.freeze take patterns"))
    folder = Path(theirs.get("__folder__") or ".") / str(theirs.get("dataset_dir") or "data")
    for key, ours in (("dataset", "data.sources"), ("eval_dataset", "data.eval")):
        if theirs.get(key):
            made.set(ours, [_source(name, folder, key, theirs, made) for name in listed(theirs[key])])
    rows_of(made, theirs.get("per_device_train_batch_size") or 8, theirs.get("gradient_accumulation_steps"))
    optimizer(made, "optim", "muon" if theirs.get("use_muon") else theirs.get("optim") or "adamw")
    _memory(theirs, made)
    if theirs.get("enable_thinking") is not None and str(theirs.get("template")).startswith("qwen3"):
        made.set("data.template_args", {"enable_thinking": bool(theirs["enable_thinking"])})
    _left_out(theirs, made, kind)
    trainer.finish(theirs, made)
    trainer.decay(theirs, made)
    made.default("schedule.warmup_steps", 0)
    adapter(made, on=kind == "lora")


def _recipe(theirs: dict[str, Any], made: Imported, stage: str, kind: str) -> None:
    """What is trained."""
    made.recipe = "lora_sft" if kind == "lora" else "full_sft"
    if stage == "pt" and kind != "lora":
        made.recipe = "pretrain"
        made.set("from_scratch", False)  # there the model's weights are trained on
        if theirs.get("streaming"):
            made.set("stream", {})
    elif theirs.get("streaming"):
        made.lost.append(("streaming", "rows are read before training; recipes/pretrain.py streams text"))
    if stage == "rm":
        made.recipe = "reward"
        made.default("reward.centre", 0.0)
    elif stage == "kto":
        preferences(made, "kto", beta=theirs.get("pref_beta"), desirable=theirs.get("kto_chosen_weight"),
                    undesirable=theirs.get("kto_rejected_weight"))  # fmt: skip
    elif stage == "dpo":
        _pairs(theirs, made)
    elif stage not in ("sft", "pt"):
        raise refused("stage", stage, "recipes/grpo.py, which learns from rewards without a value model")


def _pairs(theirs: dict[str, Any], made: Imported) -> None:
    loss = theirs.get("pref_loss") or "sigmoid"
    try:
        loss = _LOSSES(loss)
    except ValueError as error:
        made.lost.append(("pref_loss", str(error)))
        loss = "sigmoid"
    gamma, beta = theirs.get("simpo_gamma"), theirs.get("pref_beta")
    if loss == "simpo":
        gamma, beta = gamma or 0.5, beta or 0.1
    preferences(made, loss, beta=beta, gamma=gamma, sft=theirs.get("pref_ftx"),
                label_smoothing=theirs.get("dpo_label_smoothing") or None)  # fmt: skip


def _memory(theirs: dict[str, Any], made: Imported) -> None:
    """Blocks are computed again unless that is switched off."""
    if theirs.get("disable_gradient_checkpointing") or theirs.get("gradient_checkpointing") is False:
        made.set("memory.recompute", "none")
    elif theirs.get("use_unsloth_gc"):
        made.set("memory.recompute", "full")
        made.set("memory.offload", True)


def _left_out(theirs: dict[str, Any], made: Imported, kind: str) -> None:
    """What LLaMA-Factory, and Hugging Face's trainer below it, do where a key is absent."""
    if theirs.get("stage") == "pt":
        made.default("data.overlong", "split")
    else:
        made.default("data.pack", False)
        made.default("data.overlong", "drop" if made.get("data.pack") else "truncate")
    if kind == "lora":
        made.default("lora.rank", 8)
        made.default("lora.alpha", 2.0 * made.get("lora.rank"))
    if not made.get("steps"):
        made.default("epochs", 3.0)
    made.default("optim.lr", 5e-5)
    if theirs.get("lr_scheduler_type") is None:  # one without an equivalent is named as lost
        made.default("schedule.name", "linear")
    if theirs.get("pure_bf16"):
        made.set("dtype", "bf16")
    if not theirs.get("fp16"):
        made.default("dtype", "fp32")
    made.default("seed", 42)


_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "messages": "messages", "tools": "tools",
}  # fmt: skip
_PAIRS = {"prompt": "prompt", "messages": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"}
_RATED = {"prompt": "prompt", "response": "completion", "messages": "messages", "kto_tag": "label"}


def _source(name: str, folder: Path, key: str, theirs: dict[str, Any], made: Imported) -> dict[str, Any]:
    """The entry of dataset_info.json; formats of pairs and of rated answers are told from the columns."""
    info = folder / "dataset_info.json"
    entry = json.loads(info.read_text(encoding="utf-8")).get(name) if info.is_file() else None
    if entry is None:
        made.lost.append((key, f"{name!r} is not in {info}: put the file's path in data.sources"))
        return {"path": name}
    given, tags = entry.get("columns") or {}, entry.get("tags") or {}
    file = str(folder / entry["file_name"]) if "file_name" in entry else entry.get("hf_hub_url", name)
    source: dict[str, Any] = {"path": file}
    if theirs.get("stage") == "pt":
        source["format"], names = "text", {"prompt": "text"}
    elif entry.get("ranking"):
        names = _PAIRS
    elif "kto_tag" in given:
        names = _RATED
    else:
        source["format"] = "messages" if entry.get("formatting") == "sharegpt" else "alpaca"
        names = _COLUMNS
    columns = {names[key]: column for key, column in given.items() if key in names}
    if source.get("format") == "messages":
        named = (("role_tag", "role"), ("content_tag", "content"))
        columns |= {ours: tags[tag] for tag, ours in named if tag in tags}
    columns = {ours: column for ours, column in columns.items() if ours != column}
    if columns:
        source["columns"] = columns
    ours = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
    roles = {tags[tag]: role for tag, role in ours.items() if tag in tags and tags[tag] != role}
    if roles:
        source["roles"] = roles
    if entry.get("subset"):
        source["subset"] = entry["subset"]
    if theirs.get("max_samples"):
        source["split"] = f"[:{theirs['max_samples']}]"
    return source


LLAMA_FACTORY = Library("LLaMA-Factory", ("model_name_or_path",), RULES, TOGETHER, finish)
