"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B: Qwen2's attention, small experts, and one for all behind a gate."""

from ftlib.layers.moe import Moe
from ftlib.layers.shared_experts import Shared
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    activation,
    arch,
    attn,
    expert_rows,
    mlp,
    number,
    sparse_layers,
    supported,
    top_k,
)
from ftlib.models.keys import Table


def qwen2_moe(config: dict) -> Arch:
    no_window(config)
    count = number(config, "num_experts")
    moe = Moe(
        hidden=number(config, "moe_intermediate_size"),
        experts=count,
        top_k=top_k(config, count),
        act=activation(config),
        renormalize=config.get("norm_topk_prob", False),
        shared=Shared(hidden=number(config, "shared_expert_intermediate_size"), gated=True),
    )
    mixer = attn(config, qkv_bias=config.get("qkv_bias", True))
    return arch(config, [Layer(mixer=mixer, ffn=moe if sparse else mlp(config)) for sparse in sparse_layers(config)])


def no_window(config: dict) -> None:
    """Refuse windows, which no published model has. The size beside the flag says nothing then, 0 where transformers
    wrote the file: it counts as read."""
    supported(config, "use_sliding_window", False, None)
    (config | {"sliding_window": None}).get("sliding_window")


def table(config: dict) -> Table:
    rows = expert_rows(config, number(config, "num_experts"), "mlp", "gate_proj", "up_proj", "down_proj")
    return Table(rows=(*PRE_NORM_KEYS, *rows))


DEFAULTS = {"num_key_value_heads": 16, "qkv_bias": True, "norm_topk_prob": False}
FAMILY = Family(model_types=("qwen2_moe",), arch=qwen2_moe, table=table, defaults=DEFAULTS)
