"""Qwen3 dense: RMSNorm on each head's query and key, no biases; later layers may slide."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, late_windows, mlp, supported


def qwen3(config: dict) -> Arch:
    supported(config, "use_qk_norm", True, None)
    bias, feed_forward = config.get("attention_bias", False), mlp(config)
    layers = [
        Layer(mixer=attn(config, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window), ffn=feed_forward)
        for window in late_windows(config)
    ]
    return arch(config, layers)


FAMILY = Family(model_types=("qwen3",), arch=qwen3, defaults={"num_key_value_heads": 32, "head_dim": 128})
