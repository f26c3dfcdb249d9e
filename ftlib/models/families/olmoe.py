"""OLMoE 1B-7B: 64 small experts, queries and keys normalised over all heads."""

from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import PRE_NORM_KEYS, Family, activation, arch, attn, expert_rows, number, top_k
from ftlib.models.keys import Table


def olmoe(config: dict) -> Arch:
    count = number(config, "num_experts")
    moe = Moe(
        hidden=number(config, "intermediate_size"),
        experts=count,
        top_k=top_k(config, count),
        act=activation(config),
        renormalize=config.get("norm_topk_prob", False),
    )
    bias = config.get("attention_bias", False)
    mixer = attn(config, qk_norm="all", qkv_bias=bias, out_bias=bias)
    return arch(config, [Layer(mixer=mixer, ffn=moe)] * number(config, "num_hidden_layers"))


def table(config: dict) -> Table:
    rows = expert_rows(config, number(config, "num_experts"), "mlp", "gate_proj", "up_proj", "down_proj")
    return Table(rows=(*PRE_NORM_KEYS, *rows))


FAMILY = Family(model_types=("olmoe",), arch=olmoe, table=table, defaults={"rms_norm_eps": 1e-5})
