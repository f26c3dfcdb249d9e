"""Qwen2 and Qwen2.5: biases on q, k and v; later layers may slide."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, late_windows, mlp


def qwen2(config: dict) -> Arch:
    feed_forward = mlp(config)
    layers = [
        Layer(mixer=attn(config, qkv_bias=True, window=window), ffn=feed_forward)
        for window in late_windows(config)
    ]
    return arch(config, layers)


FAMILY = Family(model_types=("qwen2",), arch=qwen2, defaults={"num_key_value_heads": 32})
