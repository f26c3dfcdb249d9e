"""Llama 2, 3, 3.1, 3.2 and everything with their config: SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama …"""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, mlp, number, supported


def llama(config: dict) -> Arch:
    supported(config, "pretraining_tp", 1)
    bias = config.get("attention_bias", False)
    layer = Layer(mixer=attn(config, qkv_bias=bias, out_bias=bias), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("llama",), arch=llama)
