"""Seed-OSS: Llama with wide heads, 80 of 128 channels over a hidden size of 5120, and biases on q, k and v.

Its files name dropout of 0.1, which transformers applies in training mode; here it is read, and not applied.
"""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import PUBLISHED_DROPOUT, Family, arch, attn, mlp, number, supported


def seed_oss(config: dict) -> Arch:
    for key in ("attention_dropout", "residual_dropout"):
        supported(config, key, *PUBLISHED_DROPOUT)
    bias, out_bias = config.get("attention_bias", True), config.get("attention_out_bias", False)
    layer = Layer(mixer=attn(config, qkv_bias=bias, out_bias=out_bias), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("seed_oss",), arch=seed_oss, defaults={"num_key_value_heads": 8, "head_dim": 128})
