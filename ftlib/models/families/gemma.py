"""Gemma 2 and 3 (text): norms around each branch that scale by 1 + weight, scaled embeddings, layers that slide.

Gemma 2 caps scores and logits softly; Gemma 3 normalises queries and keys, and turns sliding layers faster.
"""

from ftlib.models.arch import SANDWICH, Arch, Layer
from ftlib.models.families.common import Family, arch, attn, head_dim, mlp, norm_keys, number, supported, windows
from ftlib.models.families.ropes import rope, ropes
from ftlib.models.keys import Table

SANDWICH_KEYS = norm_keys(
    attn_pre="input_layernorm",
    attn_post="post_attention_layernorm",
    mlp_pre="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)
GEMMA2 = {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "head_dim": 256}
# What published files of Gemma 3 leave out.
GEMMA3 = GEMMA2 | {
    "num_attention_heads": 8, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window": 4096,
}  # fmt: skip


def gemma(config: dict) -> Arch:
    supported(config, "use_bidirectional_attention", False, None)
    third, width = config["model_type"] == "gemma3_text", head_dim(config)
    if third:
        local = config.get("rope_local_base_freq") or 10_000.0
        turns = ropes(config, width, theta=1_000_000.0, local_theta=local)
    else:
        turns = dict.fromkeys(("full_attention", "sliding_attention"), rope(config, width))
    shared = {
        "qk_norm": "head" if third else "none",
        "scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "softcap": config.get("attn_logit_softcapping", None if third else 50.0),
        "qkv_bias": (bias := config.get("attention_bias", False)),
        "out_bias": bias,
    }
    feed_forward = mlp(config, act="hidden_activation")
    layers = [
        Layer(mixer=attn(config, rope=turns[kind], window=window, **shared), ffn=feed_forward, norms=SANDWICH)
        for kind, window in windows(config, pattern=config.get("sliding_window_pattern", 6) if third else 2)
    ]
    return arch(
        config,
        layers,
        zero_centered_norms=True,
        tied=config.get("tie_word_embeddings", True),
        embed_scale=number(config, "hidden_size") ** 0.5,
        logit_softcap=config.get("final_logit_softcapping", None if third else 30.0),
    )


def table(config: dict) -> Table:
    return Table(rows=SANDWICH_KEYS)


GEMMA2_FAMILY = Family(model_types=("gemma2",), arch=gemma, table=table, defaults=GEMMA2)
GEMMA3_FAMILY = Family(model_types=("gemma3_text",), arch=gemma, table=table, defaults=GEMMA3)
FAMILIES = (GEMMA2_FAMILY, GEMMA3_FAMILY)
