"""What family files share: reading both dialects of config.json, and refusing what would change the maths."""

from collections.abc import Callable
from dataclasses import dataclass

from ftlib.errors import UserError
from ftlib.layers.attention import Attn
from ftlib.layers.mlp import ACTIVATIONS, Mlp
from ftlib.layers.rope import LinearScaling, Llama3Scaling, Rope
from ftlib.models.arch import Arch, Layer
from ftlib.models.keys import Rename, Table

PRE_NORM_KEYS = (
    Rename("model.layers.{i}.attn_pre.weight", "model.layers.{i}.input_layernorm.weight"),
    Rename("model.layers.{i}.mlp_pre.weight", "model.layers.{i}.post_attention_layernorm.weight"),
)


@dataclass(frozen=True)
class Family:
    """How one model family is read."""

    model_types: tuple[str, ...]
    arch: Callable[[dict], Arch]
    table: Callable[[dict], Table] = lambda config: Table(rows=PRE_NORM_KEYS)


def require(config: dict, **expected: object) -> None:
    """Refuse a flag whose other values would change the maths and are not implemented for the family."""
    for key, value in expected.items():
        if key in config and config[key] != value:
            raise UserError(
                f"{key}={config[key]!r} is not supported for model_type {config['model_type']!r}",
                where="config.json",
                fix=f"supported: {value!r}",
            )


def number(config: dict, key: str) -> int:
    """A required size."""
    if not isinstance(config.get(key), int):
        raise UserError(f"{key} is missing or no integer: {config.get(key)!r}", where="config.json")
    return config[key]


def head_dim(config: dict) -> int:
    return config.get("head_dim") or number(config, "hidden_size") // number(config, "num_attention_heads")


def rope(config: dict) -> Rope:
    """Rope of either dialect: `rope_theta` + `rope_scaling` (Hub) or `rope_parameters` (transformers 5)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = head_dim(config)
    if kind == "default":
        return Rope(dim=dim, theta=theta)
    if kind == "linear":
        return Rope(dim=dim, theta=theta, scaling=LinearScaling(factor=scaling["factor"]))
    if kind == "llama3":
        return Rope(
            dim=dim,
            theta=theta,
            scaling=Llama3Scaling(
                factor=scaling["factor"],
                low_freq_factor=scaling["low_freq_factor"],
                high_freq_factor=scaling["high_freq_factor"],
                original_max_positions=scaling["original_max_position_embeddings"],
            ),
        )
    raise UserError(
        f"rope type {kind!r} is not supported", where="config.json", fix="supported: default, linear, llama3"
    )


def attn(config: dict, **changes: object) -> Attn:
    heads = number(config, "num_attention_heads")
    spec = {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim(config),
        "rope": rope(config),
    }
    return Attn(**(spec | changes))


def mlp(config: dict) -> Mlp:
    act = config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise UserError(
            f"activation {act!r} is not supported",
            where="config.json",
            fix=f"supported: {', '.join(ACTIVATIONS)}",
        )
    return Mlp(hidden=number(config, "intermediate_size"), act=act, bias=config.get("mlp_bias", False))


def window_per_layer(config: dict) -> list[int | None]:
    """Qwen's rule: layers from `max_window_layers` on slide, when `use_sliding_window` says so; or `layer_types`."""
    count = number(config, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if window is None:
        return [None] * count
    first = config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return [window if kind == "sliding_attention" else None for kind in types]


def arch(config: dict, layers: list[Layer], **changes: object) -> Arch:
    spec = {
        "vocab": number(config, "vocab_size"),
        "dim": number(config, "hidden_size"),
        "layers": tuple(layers),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": config.get("tie_word_embeddings", False),
        "max_positions": config.get("max_position_embeddings"),
    }
    return Arch(**(spec | changes))
