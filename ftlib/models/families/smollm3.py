"""SmolLM3: Llama whose every fourth layer does not turn queries and keys at all."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import Family, arch, attn, head_dim, layer_types, mlp, number, per_layer
from ftlib.models.families.ropes import rope


def smollm3(config: dict) -> Arch:
    count, bias = number(config, "num_hidden_layers"), config.get("attention_bias", False)
    every = config.get("no_rope_layer_interval", 4)
    turning = per_layer(config, "no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    types = layer_types(config, ["full_attention" if turns else "sliding_attention" for turns in turning])
    turns, feed_forward = rope(config, head_dim(config), theta=2_000_000.0), mlp(config)
    layers = []
    for i in range(count):
        near = window if types[i] == "sliding_attention" else None
        mixer = attn(config, rope=turns if turning[i] else None, qkv_bias=bias, out_bias=bias, window=near)
        layers.append(Layer(mixer=mixer, ffn=feed_forward))
    return arch(config, layers, tied=config.get("tie_word_embeddings", True))


FAMILY = Family(model_types=("smollm3",), arch=smollm3, defaults={"num_key_value_heads": 4})
