"""OLMo 2 and 3: norms after each branch, queries and keys normalised over all heads; 3 of 4 layers slide in OLMo 3."""

from ftlib.models.arch import POST_NORM, Arch, Layer
from ftlib.models.families.common import POST_NORM_KEYS, Family, arch, attn, head_dim, mlp, number, windows
from ftlib.models.families.ropes import rope, ropes
from ftlib.models.keys import Table


def olmo(config: dict) -> Arch:
    bias, width = config.get("attention_bias", False), head_dim(config)
    if config["model_type"] == "olmo3":
        theta = config.get("rope_theta") or 500_000.0
        turns = ropes(config, width, theta=theta, local_theta=theta)
        kinds = list(windows(config, pattern=4))
    else:
        turns = {"full_attention": rope(config, width)}
        kinds = [("full_attention", None)] * number(config, "num_hidden_layers")
    shared = {"qk_norm": "all", "qkv_bias": bias, "out_bias": bias}
    feed_forward = mlp(config)
    layers = [
        Layer(mixer=attn(config, rope=turns[kind], window=window, **shared), ffn=feed_forward, norms=POST_NORM)
        for kind, window in kinds
    ]
    return arch(config, layers)


def table(config: dict) -> Table:
    return Table(rows=POST_NORM_KEYS)


FAMILY = Family(model_types=("olmo2", "olmo3"), arch=olmo, table=table, defaults={"rms_norm_eps": 1e-5})
