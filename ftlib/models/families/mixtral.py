"""Mixtral 8x7B and 8x22B: Mistral with eight wide experts, two for each token."""

from ftlib.layers.moe import Moe
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    L,
    activation,
    arch,
    attn,
    expert_rows,
    head_dim,
    number,
    supported,
    top_k,
)
from ftlib.models.families.ropes import rope
from ftlib.models.keys import Rename, Table


def mixtral(config: dict) -> Arch:
    supported(config, "router_jitter_noise", 0, None)
    moe = Moe(
        hidden=number(config, "intermediate_size"),
        experts=number(config, "num_local_experts"),
        top_k=top_k(config, number(config, "num_local_experts")),
        act=activation(config),
    )
    turns = rope(config, head_dim(config), theta=1_000_000.0)
    layer = Layer(mixer=attn(config, rope=turns, window=config.get("sliding_window")), ffn=moe)
    return arch(config, [layer] * number(config, "num_hidden_layers"))


def table(config: dict) -> Table:
    router = Rename(f"{L}mlp.gate.weight", f"{L}block_sparse_moe.gate.weight")
    rows = expert_rows(config, number(config, "num_local_experts"), "block_sparse_moe", "w1", "w3", "w2")
    return Table(rows=(*PRE_NORM_KEYS, router, *rows))


DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
FAMILY = Family(model_types=("mixtral",), arch=mixtral, table=table, defaults=DEFAULTS)
