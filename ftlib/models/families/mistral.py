"""Mistral 7B, NeMo, Small, Large and their kin: Llama with an optional sliding window on every layer.

Ministral 3 adds YaRN and queries that grow with their position.
"""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, head_dim, mlp, number, require
from ftlib.models.families.ropes import rope


def mistral(config: dict) -> Arch:
    if third := config["model_type"] == "ministral3":
        require(config, "rope_parameters", "rope_scaling")
    turns = rope(config, head_dim(config), query_scale=third)
    layer = Layer(mixer=attn(config, rope=turns, window=config.get("sliding_window")), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("mistral",), arch=mistral, defaults={"num_key_value_heads": 8, "sliding_window": 4096})
MINISTRAL3 = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
MINISTRAL3_FAMILY = Family(model_types=("ministral3",), arch=mistral, defaults=MINISTRAL3)
