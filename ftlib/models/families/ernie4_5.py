"""ERNIE 4.5 dense: Llama whose channels turn in neighbouring pairs; one flag gives every matrix of a block a bias."""

from dataclasses import replace

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, head_dim, mlp, number, supported
from ftlib.models.families.ropes import rope


def ernie4_5(config: dict) -> Arch:
    supported(config, "mlp_bias", False, None)  # use_bias says it
    turns = rope(config, head_dim(config), theta=500_000.0, interleaved=True)
    bias = bool(config.get("use_bias", False))
    mixer = attn(config, rope=turns, qkv_bias=bias, out_bias=bias)
    layer = Layer(mixer=mixer, ffn=replace(mlp(config), bias=bias))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
FAMILY = Family(model_types=("ernie4_5",), arch=ernie4_5, defaults=DEFAULTS)
