"""Mistral 7B and its kin: Llama with an optional sliding window on every layer."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, mlp, number


def mistral(config: dict) -> Arch:
    layer = Layer(mixer=attn(config, window=config.get("sliding_window")), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("mistral",), arch=mistral)
