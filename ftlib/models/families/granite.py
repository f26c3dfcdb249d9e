"""Granite 3 dense: Llama with four multipliers, on embeddings, scores, branches and logits."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, mlp, number


def granite(config: dict) -> Arch:
    bias = config.get("attention_bias", False)
    layer = Layer(
        mixer=attn(config, qkv_bias=bias, out_bias=bias, scale=config.get("attention_multiplier", 1.0)),
        ffn=mlp(config),
        residual_scale=config.get("residual_multiplier", 1.0),
    )
    return arch(
        config,
        [layer] * number(config, "num_hidden_layers"),
        embed_scale=config.get("embedding_multiplier", 1.0),
        logit_scale=1.0 / config.get("logits_scaling", 1.0),
    )


FAMILY = Family(model_types=("granite",), arch=granite)
