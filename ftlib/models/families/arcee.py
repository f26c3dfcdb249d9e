"""Arcee AFM: Llama whose feed-forward layers have no gate, down(max(up(x), 0)^2)."""

from dataclasses import replace

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, mlp, number


def arcee(config: dict) -> Arch:
    bias = config.get("attention_bias", False)
    layer = Layer(mixer=attn(config, qkv_bias=bias, out_bias=bias), ffn=replace(mlp(config), gated=False))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


FAMILY = Family(model_types=("arcee",), arch=arcee, defaults={"rms_norm_eps": 1e-5, "hidden_act": "relu2"})
