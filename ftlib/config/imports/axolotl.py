"""Axolotl: flat keys, https://docs.axolotl.ai."""

from typing import Any

from ftlib.config.imports import axolotl_switches as switches
from ftlib.config.imports import trainer, trl
from ftlib.config.imports.axolotl_sources import TRAIN_ON_END, sources
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
    precision,
    preferences,
    prompts_too,
    refused,
    roles,
    rows_of,
    schedule,
    to,
)

_AUTO = holds("the fastest that is right is chosen: model.attention")
_TRACKER = lost("no equivalent; log.to names trackers, their own environment variables say the rest")
_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo", "kto": "kto"}
_TEMPLATES = ("chatml", "llama3", "gemma", "alpaca")  # the names that stand for the same text here


def _template(name: Any) -> str | None:
    """A built-in template of ours; one of a model's own family is in its tokenizer."""
    return name if name in _TEMPLATES else None


RULES = trainer.COMMON | {
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
    "val_set_size": to("data.eval", held_out),
    "excess_length_strategy": to("data.overlong", choice(drop="drop", truncate="truncate", **{"raise": "error"})),
    "chat_template": to("data.template", _template, "chatml, llama3, alpaca … by name; else the tokenizer's own"),
    "num_epochs": to("epochs", float),
    "lr_scheduler": to("schedule.name", schedule),
    "cosine_min_lr_ratio": to("schedule.min_ratio", float),
    "bfloat16": to("dtype", precision),
    "dp_shard_size": to("parallel.dp_shard"),
    "dp_replicate_size": to("parallel.dp_replicate"),
    "context_parallel_size": to("parallel.cp"),
    "sequence_parallel_degree": to("parallel.cp"),
    "heads_k_stride": holds("parallel.cp_style"),
    "ring_attn_func": to(
        "parallel.cp_style", choice(varlen_llama3="allgather", batch_ring="ring", batch_zigzag="ring")
    ),
    "tensor_parallel_size": to("parallel.tp"),
    "model_type": holds("read from config.json"),
    "tokenizer_type": holds("told from the tokenizer's files"),
    "num_labels": holds("one score"),
    "experimental_skip_move_to_device": holds("weights are loaded where they stay"),
    "is_llama_derived_model": holds("read from config.json"),
    "base_model_config": holds("read from config.json"),
    "strict": holds("unknown keys are always errors"),
    "flash_attention": _AUTO,
    "sdp_attention": _AUTO,
    "flex_attention": _AUTO,
    "xformers_attention": _AUTO,
    "attn_implementation": _AUTO,
    "eager_attention": _AUTO,
    "s2_attention": lost("no shifted attention"),
    "pad_to_sequence_len": holds("packed rows always have one length"),
    "eval_sample_packing": holds("as in training"),
    "sample_packing_group_size": holds("the whole epoch is packed"),
    "dataset_prepared_path": holds("tokenised rows are cached by themselves"),
    "shuffle_merged_datasets": holds("rows are shuffled from the seed"),
    "dataset_processes": holds("automatic"),
    "train_on_inputs": to("data.train_on", prompts_too),
    "roles_to_train": to("data.train_on", roles),
    "train_on_eos": to("data.train_on_end", TRAIN_ON_END),
    "gradient_checkpointing_kwargs": holds("one kind, not reentrant"),
    "auto_resume_from_checkpoints": holds("checkpoint.resume is auto"),
    "fsdp_version": holds("more than one process shards by itself: parallel.dp_shard"),
    "liger_rms_norm": holds("own kernels"),
    "liger_fused_linear_cross_entropy": holds("the loss never forms all logits"),
    "liger_glu_activation": holds("own kernels"),
    "liger_rope": holds("own kernels"),
    "lora_mlp_kernel": holds("own kernels"),
    "lora_qkv_kernel": holds("own kernels"),
    "lora_o_kernel": holds("own kernels"),
    "cut_cross_entropy": holds("the loss never forms all logits"),
    "load_in_8bit": to("model.quantize", lambda on: "int8" if on else None),
    "load_in_4bit": to("model.quantize", lambda on: "nf4" if on else None),
    "gptq": holds("read from config.json"),
    "float16": lost("bf16 is used; dtype: fp32 is there"),
    "lora_fan_in_fan_out": lost("only for GPT-2's transposed layers"),
    "lora_on_cpu": lost("no equivalent"),
    "chat_template_jinja": lost("put it in a file: data.template: my.jinja"),
    "tokens": to("tokenizer.add_tokens", listed),
    "early_stopping_patience": to("eval.patience", int),
    "eval_max_new_tokens": to("eval.max_new_tokens"),
    "eval_batch_size": holds("batch.micro_rows"),
    "eval_table_size": lost("eval.samples, eval.prompts"),
    "generate_samples": lost("eval.samples, eval.prompts"),
    "do_causal_lm_eval": lost("eval.exact_match"),
    "include_tokens_per_second": holds("metrics.jsonl has it"),
    "gc_steps": holds("never needed"),
    "resize_token_embeddings_to_32x": to("tokenizer.rows_multiple_of", lambda on: 32 if on else None),
    "shuffle_before_merging_datasets": holds("rows are shuffled from the seed"),
    "curriculum_sampling": lost("rows are shuffled from the seed"),
    "sample_packing_sequentially": lost("rows are shuffled from the seed"),
    "batch_flattening": holds("data.pack: packed rows never mix"),
    "min_sample_len": lost("leave short rows out of the file"),
    "dataset_shard_num": lost("data.sources[].split takes a part: '[:25%]'"),
    "dataset_shard_idx": lost("data.sources[].split takes a part: '[:25%]'"),
    "lora_target_parameters": lost("lora.targets takes names of layers"),
    "chat_template_kwargs": to("data.template_args"),
    "eot_tokens": lost("the end of a turn is what the chat template writes"),
    "fp8": to("model.fp8", lambda on: "tensorwise" if on else None),
    "lora_rank_pattern": to("lora.rank_pattern"),
    "lora_alpha_pattern": to("lora.alpha_pattern"),
    "dataset_exact_deduplication": to("data.deduplicate"),
    "activation_offloading": to("memory.offload", choice(true=True, false=False, legacy=True, hidden_states=True)),
    "loss_watchdog_threshold": to("optim.spike", lambda _: "raise", "far above the last 50, not above a number"),
    "loss_watchdog_patience": holds("optim.spike compares with the last 50 losses"),
    "profiler_steps": to("profile", bool, "three steps"),
    "precompute_ref_log_probs": to("dpo.reference", lambda on: "cache" if on else None),
    "center_rewards_coefficient": to("reward.centre", float),
    "quantization": lost("recipes/quantize.py rounds the result"),
    "plugins": lost("edit a copy of the recipe: tune cp"),
    "dpo_use_weighting": to("dpo.on_policy", lambda on: True if on else None),
    "wandb_project": to("log.project", lambda name: name or None),
    "wandb_name": to("log.name", lambda name: name or None),
    "wandb_entity": _TRACKER,
    "wandb_log_model": _TRACKER,
    "wandb_watch": _TRACKER,
    "wandb_run_id": _TRACKER,
    "mlflow_tracking_uri": _TRACKER,
    "mlflow_experiment_name": to("log.project", lambda name: name or None),
    "comet_project_name": _TRACKER,
    "use_comet": _TRACKER,
    "trackio_project_name": _TRACKER,
    "hub_model_id": lost("upload the result: tune push"),
    "hub_strategy": lost("upload the result: tune push"),
    "push_dataset_to_hub": lost("no equivalent"),
    "debug": lost("tune preview shows rows"),
    "save_first_step": lost("checkpoint.every=1"),
}
TOGETHER = trainer.CADENCE | {
    "adapter": "picks the recipe: lora is lora_sft, none is full_sft; qlora adds model.quantize: nf4",
    "datasets": "data.sources",
    "test_datasets": "data.eval",
    "pretraining_dataset": "data.sources, and the recipe pretrain",
    "streaming": "pretrain's `stream` section, which reads while it trains; the other recipes read before",
    "revision_of_model": "model.path: org/name@revision",
    "micro_batch_size": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.rows = micro_batch_size x gradient_accumulation_steps x devices",
    "batch_size": "batch.rows",
    "optimizer": "optim.name; AdamW of 8 or 4 bits: optim.states",
    "optim_args": "optim.momentum, optim.betas, optim.eps …",
    "lr_scheduler_kwargs": "schedule.min_ratio, schedule.decay_steps",
    "lr_groups": "optim.groups: lr_scale is their rate as a multiple of learning_rate",
    "embedding_lr": "optim.groups: lr_scale of embed_tokens and lm_head",
    "embedding_lr_scale": "optim.groups: lr_scale of embed_tokens and lm_head",
    "relora": "with jagged_restart_steps: relora.every",
    "jagged_restart_steps": "relora.every",
    "jagged_restart_warmup_steps": "relora.warmup_steps; left out it is 10 there",
    "relora_prune_ratio": "relora.keep = 1 - relora_prune_ratio; left out it is 0.9 there",
    "relora_prune_method": "magnitude; reset is relora.keep=0",
    "rl": "picks the recipe: grpo and gdpo are grpo; dpo, ipo, simpo, orpo, kto are dpo with dpo.loss",
    "trl": "of grpo: algorithm, rollout and rewards, key by key as TRL's below",
    "reward_model": "the recipe reward",
    "process_reward_model": "the recipe reward with reward.kind: steps",
    "rl_beta": "dpo.beta; of orpo its weight in dpo.loss",
    "dpo_beta": "dpo.beta",
    "dpo_label_smoothing": "dpo.label_smoothing, with dpo.loss cdpo",
    "dpo_loss_type": "dpo.loss",
    "dpo_loss_weights": "dpo.loss: {name: weight}",
    "rpo_alpha": "dpo.sft",
    "cpo_alpha": "dpo.sft",
    "simpo_gamma": "dpo.gamma",
    "orpo_alpha": "dpo.loss: {sft: 1, orpo: orpo_alpha}",
    "kto_desirable_weight": "dpo.desirable",
    "kto_undesirable_weight": "dpo.undesirable",
    "gradient_checkpointing": "memory.recompute; offload: memory.offload too",
    "selective_checkpointing": "memory.recompute: selective",
    "tiled_mlp": "memory.tiled_mlp: tokens at a time",
    "tiled_mlp_num_shards": "memory.tiled_mlp = sequence_len / tiled_mlp_num_shards",
    "qat": "qat.scheme, qat.group, qat.after",
    "use_eaft": "loss.name: eaft",
    "eaft_alpha": "loss.eaft_alpha",
    "eaft_k": "loss.eaft_k",
    "use_dynamic_finetuning": "loss.name: dft",
    "loftq_config": "lora.init: loftq, and model.quantize",
    "peft": "loftq_config in it: lora.init: loftq, and model.quantize",
    "special_tokens": "pad_token is tokenizer.pad_token; others: change the tokenizer's files",
    "use_tensorboard": "log.to",
    "use_wandb": "log.to",
    "use_mlflow": "log.to",
    "evals_per_epoch": "eval.every, a share of the run, where the number of epochs is known",
    "saves_per_epoch": "checkpoint.every, a share of the run, where the number of epochs is known",
}


def finish(theirs: dict[str, Any], made: Imported) -> None:
    """Recipe, sources, batch, optimizer, and what several keys decide together."""
    kind = theirs.get("adapter")
    _recipe(theirs, made)
    if kind == "qlora":
        made.set("model.quantize", "nf4")
    elif kind not in (None, "", "lora"):
        made.lost.append(("adapter", f"{kind!r}: lora or qlora"))
    sources(theirs, made)
    if theirs.get("revision_of_model"):
        made.set("model.path", f"{theirs.get('base_model')}@{theirs['revision_of_model']}")
    optimizer(made, "optimizer", theirs.get("optimizer") or "adamw")
    for decide in (trainer.finish, trainer.decay, *switches.ALL):
        decide(theirs, made)
    if made.recipe == "grpo":
        trl.policy(theirs.get("trl") or {}, made, theirs.get("micro_batch_size"),
                   theirs.get("gradient_accumulation_steps"), prefix="trl.")  # fmt: skip
    else:
        rows_of(made, theirs.get("micro_batch_size"), theirs.get("gradient_accumulation_steps"))
    adapter(made, on=bool(kind))
    _left_out(theirs, made)


def _recipe(theirs: dict[str, Any], made: Imported) -> None:
    """What is trained: `rl` and `reward_model` win over `adapter`, which tells plain fine-tuning apart."""
    rl = theirs.get("rl")
    made.recipe = (
        "pretrain" if theirs.get("pretraining_dataset") else "lora_sft" if theirs.get("adapter") else "full_sft"
    )
    if made.recipe == "pretrain":
        made.set("from_scratch", False)  # there the base model's weights are trained on
        if theirs.get("streaming") is not False:
            made.set("stream", {})
    elif theirs.get("streaming"):
        made.lost.append(("streaming", "rows are read before training; recipes/pretrain.py streams text"))
    if rl in ("grpo", "gdpo"):
        made.recipe = "grpo"
        made.set("algorithm.preset", rl)
    elif rl in _LOSSES:
        _preferences(theirs, made)
    elif rl:
        raise refused("rl", rl, "recipes/grpo.py, which learns from rewards without a value model")
    elif theirs.get("reward_model"):
        made.recipe = "reward"
        made.default("reward.centre", 0.0)
    elif theirs.get("process_reward_model"):
        made.recipe = "reward"
        made.set("reward.kind", "steps")


def _preferences(theirs: dict[str, Any], made: Imported) -> None:
    """`rl` and the constants of its loss, each of which has a key of its own."""
    loss, smoothing = _LOSSES[theirs["rl"]], theirs.get("dpo_label_smoothing")
    constants = {
        "beta": theirs.get("rl_beta") or theirs.get("dpo_beta"),
        "sft": theirs.get("rpo_alpha") or theirs.get("cpo_alpha"),
    }
    if loss == "sigmoid":
        named = trainer.pair_losses(made, "dpo_loss_type", theirs.get("dpo_loss_type"))
        preferences(made, named, theirs.get("dpo_loss_weights"), label_smoothing=smoothing or None, **constants)
    elif loss == "simpo":
        constants["beta"] = constants["beta"] or 0.1
        preferences(made, loss, gamma=theirs.get("simpo_gamma") or 0.5, **constants)
    elif loss == "orpo":
        constants["beta"] = theirs.get("orpo_alpha") or constants["beta"]
        preferences(made, loss, **constants)
    elif loss == "kto":
        weights = {"desirable": theirs.get("kto_desirable_weight"), "undesirable": theirs.get("kto_undesirable_weight")}
        preferences(made, loss, **constants, **weights)
    else:
        preferences(made, loss, **constants)


def _left_out(theirs: dict[str, Any], made: Imported) -> None:
    """What Axolotl does where a key is absent: no packing, documents of 512 tokens, 3 % warm-up, …"""
    if made.recipe == "grpo":
        if not theirs.get("lr_scheduler"):
            made.default("schedule.name", "cosine")
    elif made.recipe != "pretrain":
        made.default("data.pack", False)
    elif made.get("stream") is None:
        made.default("data.overlong", "split")
    made.default("data.seq_len", 512)
    made.default("seed", 42)
    if theirs.get("float16"):  # named as lost: bf16 is nearest
        made.set("dtype", "bf16")
    if made.get("steps"):
        made.default("schedule.warmup_steps", min(int(0.03 * made.get("steps")), 100))
    else:
        made.default("schedule.warmup_steps", 0.03)  # at most 100 steps there


AXOLOTL = Library("Axolotl", ("base_model",), RULES, TOGETHER, finish)
