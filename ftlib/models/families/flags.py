"""Refuse what a family does not read: a flag that changes the maths must not be passed over in silence."""

from ftlib.errors import UserError

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
    "altup_num_inputs": (), "kv_lora_rank": (), "hidden_activation": (),
}  # fmt: skip


class Watched(dict):
    """A config.json that remembers which keys a family looked at."""

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> object:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.seen.add(key)
        return super().get(key, default)


def check_flags(config: Watched, where: str) -> None:
    """UserError naming every flag that changes the maths and that the family did not read."""
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
        raise UserError("\n".join(wrong), where=where)
