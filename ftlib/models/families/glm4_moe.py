"""GLM-4.5, 4.5-Air, 4.6 and 4.7: experts scored by a sigmoid beside one for all, the first layers dense.

Checkpoints have further layers behind the last one, which predict tokens ahead: left out, as transformers does.
"""

from ftlib.layers.moe import Moe
from ftlib.layers.shared_experts import Shared
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.common import (
    PRE_NORM_KEYS,
    Family,
    activation,
    arch,
    attn,
    expert_groups,
    expert_rows,
    mlp,
    number,
    supported,
    top_k,
)
from ftlib.models.keys import Table


def glm4_moe(config: dict) -> Arch:
    supported(config, "scoring_func", "sigmoid", None)
    supported(config, "topk_method", "noaux_tc", None)
    count, width = number(config, "n_routed_experts"), number(config, "moe_intermediate_size")
    groups, top_groups = expert_groups(config, count)
    moe = Moe(
        hidden=width,
        experts=count,
        top_k=top_k(config, count),
        act=activation(config),
        score="sigmoid",
        renormalize=config.get("norm_topk_prob", True),
        scale=config.get("routed_scaling_factor", 1.0),
        groups=groups,
        top_groups=top_groups,
        shared=Shared(hidden=width * number(config, "n_shared_experts")),
    )
    norm = "head" if config.get("use_qk_norm", False) else "none"
    mixer = attn(config, qk_norm=norm, qkv_bias=config.get("attention_bias", False))
    dense, layers = config.get("first_k_dense_replace", 1), number(config, "num_hidden_layers")
    return arch(config, [Layer(mixer=mixer, ffn=mlp(config) if i < dense else moe) for i in range(layers)])


def table(config: dict) -> Table:
    rows = expert_rows(config, number(config, "n_routed_experts"), "mlp", "gate_proj", "up_proj", "down_proj")
    last, ahead = number(config, "num_hidden_layers"), config.get("num_nextn_predict_layers", 1)
    extra = tuple(rf"model\.layers\.{last + i}\..*" for i in range(ahead))
    return Table(rows=(*PRE_NORM_KEYS, *rows), drop=(*Table().drop, *extra))


DEFAULTS = {
    "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "n_routed_experts": 128, "norm_topk_prob": True, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 1,
}  # fmt: skip
FAMILY = Family(model_types=("glm4_moe",), arch=glm4_moe, table=table, defaults=DEFAULTS)
