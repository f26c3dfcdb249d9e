"""Qwen3 mixtures of experts (30B-A3B, 235B-A22B, Coder): Qwen3's attention, many small experts."""

from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    activation,
    arch,
    attn,
    expert_rows,
    late_windows,
    mlp,
    number,
    sparse_layers,
    supported,
    top_k,
)
from ftlib.models.keys import Table


def experts(config: dict) -> int:
    return number(config, "num_local_experts" if "num_local_experts" in config else "num_experts")


def qwen3_moe(config: dict) -> Arch:
    supported(config, "use_qk_norm", True, None)
    moe = Moe(
        hidden=number(config, "moe_intermediate_size"),
        experts=experts(config),
        top_k=top_k(config, experts(config)),
        act=activation(config),
        renormalize=config.get("norm_topk_prob", False),
    )
    bias = config.get("attention_bias", False)
    layers = []
    for window, sparse in zip(late_windows(config), sparse_layers(config), strict=True):
        mixer = attn(config, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
        layers.append(Layer(mixer=mixer, ffn=moe if sparse else mlp(config)))
    return arch(config, layers)


def table(config: dict) -> Table:
    rows = expert_rows(config, experts(config), "mlp", "gate_proj", "up_proj", "down_proj")
    return Table(rows=(*PRE_NORM_KEYS, *rows))


FAMILY = Family(model_types=("qwen3_moe",), arch=qwen3_moe, table=table, defaults={"num_key_value_heads": 4})
