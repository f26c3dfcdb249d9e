"""Mistral 7B, NeMo, Small, Large and their kin: Llama with an optional sliding window on every layer.

Ministral 3 adds YaRN and queries that grow with their position.
"""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, head_dim, mlp, number
from ftlib.models.families.ropes import rope


def mistral(config: dict) -> Arch:
    turns = rope(config, head_dim(config), query_scale=config["model_type"] == "ministral3")
    layer = Layer(mixer=attn(config, rope=turns, window=config.get("sliding_window")), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("mistral", "ministral3"), arch=mistral)
