"""EXAONE 4.0: norms after each branch and on each head's query and key. The 32B's layers slide, but every fourth sees
everything and does not turn queries and keys; the 1.2B, without a window, turns them in all layers."""

from ftlib.models.arch import POST_NORM, Arch, Layer
from ftlib.models.families.common import POST_NORM_KEYS, Family, arch, attn, head_dim, mlp, number, supported, windows
from ftlib.models.families.ropes import rope
from ftlib.models.families.watched import Watched
from ftlib.models.keys import Table


def exaone4(config: Watched) -> Arch:
    supported(config, "reorder_qk_norm", True)
    supported(config, "mlp_bias", False, None)
    # Where `layer_types` are, they decide; a pattern of letters ("LLLG") without them is refused.
    config.seen.add("sliding_window_pattern")
    pattern = 1 if config.get("layer_types") else number(config, "sliding_window_pattern")
    turns, hybrid, feed_forward = rope(config, head_dim(config)), config.get("sliding_window"), mlp(config)
    layers = []
    for kind, window in windows(config, pattern):
        turned = turns if kind == "sliding_attention" or not hybrid else None
        mixer = attn(config, rope=turned, qk_norm="head", window=window)
        layers.append(Layer(mixer=mixer, ffn=feed_forward, norms=POST_NORM))
    return arch(config, layers)


def table(config: dict) -> Table:
    return Table(rows=POST_NORM_KEYS)


DEFAULTS = {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}
FAMILY = Family(model_types=("exaone4",), arch=exaone4, table=table, defaults=DEFAULTS)
