"""gpt-oss 20B and 120B: attention sinks, every other layer slides, YaRN, biased experts with a clamped SwiGLU."""

from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    L,
    arch,
    attn,
    head_dim,
    number,
    require,
    supported,
    top_k,
    windows,
)
from ftlib.models.families.ropes import rope
from ftlib.models.keys import Rename, Table


def gpt_oss(config: dict) -> Arch:
    supported(config, "hidden_act", "silu")
    supported(config, "swiglu_alpha", 1.702)
    supported(config, "swiglu_limit", 7.0)
    require(config, "rope_parameters", "rope_scaling")
    turns = rope(config, head_dim(config), theta=150_000.0)
    moe = Moe(
        hidden=number(config, "intermediate_size"),
        experts=number(config, "num_local_experts"),
        top_k=top_k(config, number(config, "num_local_experts")),
        score="softmax_of_top",
        clamp=7.0,
        bias=True,
        transposed=True,
        interleaved=True,
    )
    bias = config.get("attention_bias", True)
    layers = [
        Layer(mixer=attn(config, rope=turns, qkv_bias=bias, out_bias=bias, sinks=True, window=window), ffn=moe)
        for _, window in windows(config, pattern=2)
    ]
    return arch(config, layers)


def table(config: dict) -> Table:
    experts = [
        Rename(f"{L}mlp.experts.{name}.{ours}", f"{L}mlp.experts.{name}{hf}")
        for name in ("gate_up_proj", "down_proj")
        for ours, hf in (("weight", ""), ("bias", "_bias"))
    ]
    return Table(rows=(*PRE_NORM_KEYS, *experts))


DEFAULTS = {"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5}
FAMILY = Family(model_types=("gpt_oss",), arch=gpt_oss, table=table, defaults=DEFAULTS)
