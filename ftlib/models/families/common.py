"""What family files share: sizes, flags and layers out of config.json."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ftlib.errors import UserError
from ftlib.layers.attention import Attn
from ftlib.layers.mlp import ACTIVATIONS, Mlp
from ftlib.models.arch import Arch, Layer
from ftlib.models.families.ropes import rope
from ftlib.models.keys import Part, Rename, Row, Stack, Table

L = "model.layers.{i}."
PUBLISHED_DROPOUT = (0, 0.1)  # of the makers' own training, in some files: here it is not applied


def norm_keys(**slots: str) -> tuple[Row, ...]:
    """Rows for a block's norms: slot (`attn_pre` …) = the checkpoint's name for it."""
    return tuple(Rename(f"{L}{slot}.weight", f"{L}{hf}.weight") for slot, hf in slots.items())


PRE_NORM_KEYS = norm_keys(attn_pre="input_layernorm", mlp_pre="post_attention_layernorm")
POST_NORM_KEYS = norm_keys(attn_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How one model family is read."""

    model_types: tuple[str, ...]
    arch: Callable[[dict], Arch]
    table: Callable[[dict], Table] = lambda config: Table(rows=PRE_NORM_KEYS)
    defaults: dict = field(default_factory=dict)  # of keys that a config leaves out, where they are not everyone's


def supported(config: dict, key: str, *values: object) -> None:
    """Refuse values of a flag that would change the maths and are not implemented for the family."""
    if key in config and config[key] not in values:
        raise UserError(
            f"{key}={config[key]!r} is not supported for model_type {config['model_type']!r}",
            where="config.json",
            fix=f"supported: {', '.join(map(repr, values))}",
        )


def require(config: dict, *keys: str) -> None:
    """UserError where a config says nothing under any of `keys`."""
    if not any(config.get(key) for key in keys):
        fix = "take it from the published file of the model"
        raise UserError(f"{' or '.join(keys)} is missing", where="config.json", fix=fix)


def number(config: dict, key: str) -> int:
    """A required size."""
    if not isinstance(value := config.get(key), int):
        fix = f"write {key} as a positive whole number; the published file of the model has it"
        raise UserError(f"{key} is missing or no integer: {value!r}", where="config.json", fix=fix)
    return value


def top_k(config: dict, experts: int) -> int:
    """How many of `experts` a token goes to."""
    if (count := number(config, "num_experts_per_tok")) > experts:
        what = f"num_experts_per_tok is {count}, and the model has {experts} experts"
        raise UserError(what, where="config.json", fix=f"at most {experts}, as the published file has it")
    return count


def expert_groups(config: dict, experts: int) -> tuple[int, int]:
    """How many groups `experts` come in, and how many of them are open to a token. UserError where groups are unequal
    or have one expert, or where those that are open have too few."""
    count, top = number(config, "n_group"), number(config, "topk_group")
    size, wanted = experts // count, number(config, "num_experts_per_tok")
    if count > 1 and (experts % count or size < 2 or top > count or size * top < wanted):
        what = f"n_group {count} and topk_group {top} do not fit {experts} experts, {wanted} for a token"
        raise UserError(what, where="config.json", fix="take them from the published file")
    return count, top


def per_layer(config: dict, key: str) -> list | None:
    """A list with an entry for each layer; None where it is left out or empty."""
    given, count = config.get(key), number(config, "num_hidden_layers")
    if given and (not isinstance(given, list) or len(given) != count):
        entries = f"{len(given)} entries" if isinstance(given, list) else f"no list: {given!r}"
        what = f"{key} has {entries}, and num_hidden_layers is {count}"
        raise UserError(what, where="config.json", fix=f"write {count} entries, as the published file has them")
    return given or None


def layer_types(config: dict, default: list[str]) -> list[str]:
    """`layer_types` of a config whose layers see everything or slide; `default` where it is left out."""
    types = per_layer(config, "layer_types") or default
    if unknown := [kind for kind in types if kind not in ("full_attention", "sliding_attention")]:
        fix = "supported: full_attention, sliding_attention"
        raise UserError(f"layer type {unknown[0]!r} is not supported", where="config.json", fix=fix)
    return types


def head_dim(config: dict) -> int:
    return config.get("head_dim") or number(config, "hidden_size") // number(config, "num_attention_heads")


def attn(config: dict, **changes: object) -> Attn:
    """Attention as most families have it; `changes` are fields of `Attn`."""
    heads = number(config, "num_attention_heads")
    spec = {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim(config),
    }
    if "rope" not in changes:
        spec["rope"] = rope(config, head_dim(config))
    return Attn(**(spec | changes))


def activation(config: dict, key: str = "hidden_act") -> str:
    act = config.get(key) or "silu"
    if act not in ACTIVATIONS:
        raise UserError(
            f"activation {act!r} is not supported",
            where="config.json",
            fix=f"supported: {', '.join(ACTIVATIONS)}",
        )
    return act


def mlp(config: dict, act: str = "hidden_act") -> Mlp:
    return Mlp(
        hidden=number(config, "intermediate_size"), act=activation(config, act), bias=config.get("mlp_bias", False)
    )


def windows(config: dict, pattern: int) -> Iterator[tuple[str, int | None]]:
    """(layer type, window) of each layer: `layer_types`, or full attention on every `pattern`-th, others sliding."""
    count = number(config, "num_hidden_layers")
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    types = layer_types(config, default)
    for kind in types:
        yield kind, number(config, "sliding_window") if kind == "sliding_attention" else None


def late_windows(config: dict) -> list[int | None]:
    """Qwen's rule: layers from `max_window_layers` on slide, when `use_sliding_window` says so; or `layer_types`."""
    count, window = number(config, "num_hidden_layers"), config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", False):
        return [None] * count
    first = config.get("max_window_layers", 28)
    types = layer_types(config, ["sliding_attention" if i >= first else "full_attention" for i in range(count)])
    return [window if kind == "sliding_attention" else None for kind in types]


def sparse_layers(config: dict) -> list[bool]:
    """Qwen's rule of which layers have experts: every `decoder_sparse_step`-th, but none of `mlp_only_layers`."""
    dense, count = config.get("mlp_only_layers") or (), number(config, "num_hidden_layers")
    every = number(config, "decoder_sparse_step") if "decoder_sparse_step" in config else 1
    return [i not in dense and (i + 1) % every == 0 for i in range(count)]


def fused_rows(hf: str, **parts: int) -> tuple[Row, ...]:
    """Rows of a fused checkpoint tensor: our name of each part, in order, = its rows."""
    rows, start = [], 0
    for ours, size in parts.items():
        folder = hf.rpartition(".")[0]
        rows.append(Part(f"{L}{folder}.{ours}.weight", f"{L}{hf}.weight", start, start + size))
        start += size
    return tuple(rows)


def gate_up_rows(config: dict) -> tuple[Row, ...]:
    size = number(config, "intermediate_size")
    return fused_rows("mlp.gate_up_proj", gate_proj=size, up_proj=size)


def expert_rows(config: dict, count: int, folder: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Stacks of experts that the checkpoint keeps one by one under `folder`."""
    one = f"{L}{folder}.experts.{{e}}."
    return (
        Stack(f"{L}mlp.experts.gate_up_proj.weight", (f"{one}{gate}.weight", f"{one}{up}.weight"), count),
        Stack(f"{L}mlp.experts.down_proj.weight", (f"{one}{down}.weight",), count),
    )


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
