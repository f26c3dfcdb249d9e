"""Refuse what a family does not read: a flag that changes the maths must not be passed over in silence.

So a key is read, or known to change nothing (`HARMLESS`), or has a value that means nothing special (`NEUTRAL`).
"""

from ftlib.errors import UserError
from ftlib.models.families.watched import Watched

# Keys that change the maths in some family, and the values that mean nothing special. A family that reads a key is
# taken to serve it; another one must find a neutral value.
NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False,), "attention_in_bias": (False,), "attention_out_bias": (False,), "qkv_bias": (False,),
    "mlp_bias": (False,), "lm_head_bias": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,),
    "clip_qkv": (), "attention_chunk_size": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "query_pre_attn_scalar": (), "attention_multiplier": (1.0,), "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,), "logits_scaling": (1.0,), "logit_scale": (1.0,), "scale_emb": (1.0,),
    "partial_rotary_factor": (1.0,), "rotary_pct": (1.0,), "rope_interleaved": (False,), "no_rope_layers": ([],),
    "no_rope_layer_interval": (), "rope_local_base_freq": (), "sliding_window": (), "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,), "use_parallel_residual": (False,), "parallel_attn": (False,),
    "alibi": (False,), "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,),
    "n_shared_experts": (0,), "shared_expert_intermediate_size": (0,), "first_k_dense_replace": (0,),
    "attention_dropout": (0, 0.0), "resid_pdrop": (0, 0.0), "embd_pdrop": (0, 0.0), "hidden_dropout": (0, 0.0),
    "router_jitter_noise": (0, 0.0), "swiglu_limit": (), "use_mrope": (False,), "num_kv_shared_layers": (0,),
    "altup_num_inputs": (), "kv_lora_rank": (), "hidden_activation": (), "is_causal": (True,),
    "scoring_func": ("softmax",), "topk_method": ("greedy",), "routed_scaling_factor": (1.0,), "n_group": (1,),
    "topk_group": (1,), "full_attn_mod": (1,), "interpolate_factor": (1,), "num_nextn_predict_layers": (0,),
    "hidden_dropout_prob": (0, 0.0), "attention_probs_dropout_prob": (0, 0.0), "residual_dropout": (0, 0.0),
    "use_bias": (False,),
}  # fmt: skip
# Keys that no family has to read, as they change nothing that the model computes from its tokens.
HARMLESS = frozenset({
    # Where the file comes from, and what other programs do with it.
    "model_type", "architectures", "auto_map", "name_or_path", "transformers_version", "transformers.js_config",
    "model_name", "revision", "license", "unsloth_version", "unsloth_fixed", "unsloth_training_version",
    "is_llama_config", "tokenizer_class", "language", "custom_pipelines", "dtype", "torch_dtype", "torchscript",
    "use_bfloat16", "quantization_config", "attn_implementation", "use_flash_attn", "gradient_checkpointing",
    "pretraining_tp", "is_decoder", "dual_chunk_attention_config",
    # A classifier's names, and what a call of the model returns.
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix",
    "return_dict", "output_hidden_states", "output_attentions", "output_scores", "return_dict_in_generate",
    # Generation.
    "use_cache", "cache_implementation", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
    "exponential_decay_length_penalty", "chunk_size_feed_forward",
    # Tokens by other names, and pooling for a classifier (Hunyuan).
    "pad_id", "im_start_id", "im_end_id", "im_newline_id", "mask_init_id", "text_start_id", "text_end_id",
    "org_vocab_size", "class_num", "pool_type", "dense_list", "cla_share_factor",
    # Training: the recipes say it.
    "initializer_range", "output_router_logits", "router_aux_loss_coef", "embedding_initializer_range",
    # Sizes, which the files' shapes show, and what stands beside the one that is read.
    "vocab_size", "intermediate_size", "head_dim", "attention_head_dim", "hidden_act", "max_window_layers",
    "max_position_embeddings", "original_max_position_embeddings", "initial_context_length", "max_sequence_length",
    "model_max_length", "seq_length", "experts_per_token", "layer_types", "rope_theta", "text_config", "vision_config",
})  # fmt: skip
OWN = "what changes the maths needs a family of your own that reads it: model.code"
ENDS = ("_token_id", "_token_ids", "_token_index")


def unread(config: Watched) -> list[str]:
    """Keys that say something, that no one read and that no list here knows."""
    known = config.seen | NEUTRAL.keys() | HARMLESS
    return [
        key for key, value in config.items()
        if key not in known and not key.startswith("_") and not key.endswith(ENDS)
        and not (value is None or value is False or (isinstance(value, str | list | dict) and not value))
    ]  # fmt: skip


def check_flags(config: Watched, where: str) -> None:
    """UserError naming every flag that changes the maths, or may, and that the family did not read."""
    wrong = []
    for key, neutral in NEUTRAL.items():
        value = dict.get(config, key)
        if key not in config.seen and value is not None and value not in neutral:
            fix = f" (supported: {', '.join(map(repr, neutral)) or 'none given'})"
            wrong.append(f"{key}={value!r} is not supported for model_type {config['model_type']!r}{fix}")
    types = set(dict.get(config, "layer_types") or ())
    if "layer_types" not in config.seen and types - {"full_attention"}:
        wrong.append(f"layer_types {sorted(types)} is not supported for model_type {config['model_type']!r}")
    if wrong:
        raise UserError("\n".join(wrong), where=where, fix=OWN)
    if keys := unread(config):
        said = ", ".join(f"{key}={dict.get(config, key)!r}" for key in keys)
        raise UserError(
            f"model_type {config['model_type']!r} has no reader for {said}, and it may change what the model computes",
            where=where,
            fix=f"take keys that change nothing (notes, settings of other programs) out of the file; {OWN}",
        )
