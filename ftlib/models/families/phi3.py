"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama whose checkpoint fuses q, k, v and gate, up; LongRoPE in some."""

from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    arch,
    attn,
    fused_rows,
    gate_up_rows,
    mlp,
    number,
    supported,
)
from ftlib.models.keys import Table


def phi3(config: dict) -> Arch:
    for key in ("resid_pdrop", "embd_pdrop"):
        supported(config, key, 0)
    layer = Layer(mixer=attn(config, window=config.get("sliding_window")), ffn=mlp(config))
    return arch(config, [layer] * number(config, "num_hidden_layers"))


def table(config: dict) -> Table:
    one = attn(config)
    kv = one.kv_heads * one.head_dim
    qkv = fused_rows("self_attn.qkv_proj", q_proj=one.heads * one.head_dim, k_proj=kv, v_proj=kv)
    return Table(rows=(*PRE_NORM_KEYS, *qkv, *gate_up_rows(config)))


FAMILY = Family(model_types=("phi3",), arch=phi3, table=table, defaults={"rms_norm_eps": 1e-5})
