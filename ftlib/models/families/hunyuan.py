"""Hunyuan dense (0.5B to 7B): RMSNorm on each head's query and key after they have turned, and a stretched rope.

Files call that rope `dynamic`, yet with an alpha nothing in it depends on the length of a sequence: of heads with d
channels the base is theta * alpha^(d / (d - 2)), as in transformers 5.23 (in 5.17 up to `max_position_embeddings`).
"""

from ftlib.errors import UserError
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    PUBLISHED_DROPOUT,
    Family,
    arch,
    attn,
    head_dim,
    mlp,
    norm_keys,
    number,
    supported,
)
from ftlib.models.families.ropes import is_number, rope
from ftlib.models.keys import Table

QK_NORM_KEYS = norm_keys(
    **{"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}
)
# What stands beside an alpha in published files, and is not used then.
UNUSED = {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


def hunyuan(config: dict) -> Arch:
    supported(config, "attention_dropout", *PUBLISHED_DROPOUT)
    flags = {"use_qk_norm": True, "use_rotary_pos_emb": True, "use_cla": False, "mlp_bias": False}
    for key, value in (flags | {"norm_type": "rms", "partial_rotary_factor": 1.0}).items():
        supported(config, key, value, None)
    bias, turns = config.get("attention_bias", False), rope(stretched(config), head_dim(config))
    mixer = attn(config, rope=turns, qk_norm="head", norm_after_rope=True, qkv_bias=bias, out_bias=bias)
    return arch(config, [Layer(mixer=mixer, ffn=mlp(config))] * number(config, "num_hidden_layers"))


def stretched(config: dict) -> dict:
    """A config whose rope has an alpha, as one with the base that it makes; any other as it is."""
    given = config.get("rope_parameters") or config.get("rope_scaling")
    given = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    if given.get("rope_type", given.get("type")) != "dynamic" or "alpha" not in given:
        return config
    base, width = given.get("rope_theta") or config.get("rope_theta") or 10_000.0, head_dim(config)
    if not (is_number(alpha := given["alpha"]) and is_number(base)):
        what = f"alpha and rope_theta must be positive numbers, and are {alpha!r} and {base!r}"
        raise UserError(what, where="config.json", fix="take them from the published file of the model")
    plain = {k: v for k, v in given.items() if k not in UNUSED | {"alpha", "type"}}
    plain |= {"rope_type": "default", "rope_theta": base * alpha ** (width / (width - 2))}
    return config | {"rope_parameters": plain}


def table(config: dict) -> Table:
    return Table(rows=(*PRE_NORM_KEYS, *QK_NORM_KEYS))


FAMILY = Family(model_types=("hunyuan_v1_dense",), arch=hunyuan, table=table, defaults={"rms_norm_eps": 1e-5})
