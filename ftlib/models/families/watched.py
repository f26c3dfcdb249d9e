"""A config.json that knows what was read of it, and that gives out no value of another kind than its key has."""

from ftlib.errors import UserError
from ftlib.models.families.ropes import is_number

COUNTS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts", "num_experts_per_tok",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "sliding_window_pattern",
    "decoder_sparse_step", "no_rope_layer_interval", "n_routed_experts", "n_shared_experts", "n_group", "topk_group",
    "shared_expert_intermediate_size",
})  # fmt: skip
# What may be null: then it is as if it were not there.
OPTIONAL = frozenset({
    "attn_logit_softcapping", "final_logit_softcapping", "rope_theta", "partial_rotary_factor", "rope_local_base_freq",
})  # fmt: skip
NUMBERS = OPTIONAL | {
    "rms_norm_eps", "query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier", "residual_multiplier",
    "logits_scaling", "routed_scaling_factor",
}  # fmt: skip
SWITCHES = frozenset({
    "attention_bias", "attention_out_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob",
    "qkv_bias", "use_qk_norm", "use_bias",
})  # fmt: skip


class Watched(dict):
    """A config.json that remembers which keys a family looked at; UserError for a value of the wrong kind."""

    def __init__(self, config: dict, seen: set[str] | None = None) -> None:
        super().__init__(config)
        self.seen: set[str] = set() if seen is None else seen

    def __getitem__(self, key: str) -> object:
        return self._looked_at(key, super().__getitem__(key))

    def get(self, key: str, default: object = None) -> object:
        return self._looked_at(key, super().get(key, default))

    def __or__(self, other: dict) -> "Watched":
        """Changed keys, watched as one with the original."""
        return Watched(super().__or__(other), self.seen)

    def _looked_at(self, key: str, value: object) -> object:
        self.seen.add(key)
        if key in COUNTS:
            kind, right = "a positive whole number", value is None or (type(value) is int and value > 0)
        elif key in NUMBERS:
            absent = value is None and (key in OPTIONAL or key not in self)
            kind, right = "a positive number", absent or is_number(value)
        elif key in SWITCHES:
            kind, right = "true or false", value is None or isinstance(value, bool)
        else:
            return value
        if not right:
            fix = f"write {kind}, as the published file has it"
            raise UserError(f"{key} must be {kind}, and it is {value!r}", where="config.json", fix=fix)
        return value
