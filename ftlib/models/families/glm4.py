"""GLM-4 (0414): norms around each branch, half of each head's channels turn, paired as neighbours."""

from ftlib.models.arch import SANDWICH, Arch, Layer
from ftlib.models.families.common import Family, arch, attn, gate_up_rows, head_dim, mlp, norm_keys, number
from ftlib.models.families.ropes import rope
from ftlib.models.keys import Table

SANDWICH_KEYS = norm_keys(
    attn_pre="input_layernorm",
    attn_post="post_self_attn_layernorm",
    mlp_pre="post_attention_layernorm",
    mlp_post="post_mlp_layernorm",
)


def glm4(config: dict) -> Arch:
    turns = rope(config, head_dim(config), interleaved=True)
    mixer = attn(config, rope=turns, qkv_bias=config.get("attention_bias", False))
    layer = Layer(mixer=mixer, ffn=mlp(config), norms=SANDWICH)
    return arch(config, [layer] * number(config, "num_hidden_layers"))


def table(config: dict) -> Table:
    return Table(rows=(*SANDWICH_KEYS, *gate_up_rows(config)))


DEFAULTS = {
    "partial_rotary_factor": 0.5, "attention_bias": True, "num_key_value_heads": 2, "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
}  # fmt: skip
FAMILY = Family(model_types=("glm4",), arch=glm4, table=table, defaults=DEFAULTS)
