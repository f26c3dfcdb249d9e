"""Rotary embedding out of config.json, in both its dialects, and never by a guess.

Hub files say `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`, nested by layer type in families
whose layers differ.
"""

import math

from ftlib.errors import UserError
from ftlib.layers.rope import LinearScaling, Llama3Scaling, LongScaling, QueryScale, Rope, Scaling, YarnScaling

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings"}
# What each type may say; anything else could change the maths and is refused.
KEYS = {
    "default": {"original_max_position_embeddings"},
    "linear": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
             "mscale_all_dim", "truncate"},
    "longrope": {"factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"},
}  # fmt: skip
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
          "original_max_position_embeddings"), "longrope": ("short_factor", "long_factor")}  # fmt: skip
OLD_NAMES = {"su": "longrope"}
KINDS = ("full_attention", "sliding_attention")


def is_number(value: object) -> bool:
    """Whether it is a positive, finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def rope(
    config: dict, head_dim: int, *, theta: float = 10_000.0, interleaved: bool = False, query_scale: bool = False
) -> Rope:
    """The rope of a config.json with one rope. `theta`: the family's default; `query_scale`: it may scale queries."""
    given = _given(config, ("rope_parameters", "rope_scaling"))
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError("rope_parameters differ by layer type", where="config.json", fix="supported here: one for all")
    beta = given.pop("llama_4_scaling_beta", None) if query_scale else None
    kind = str(given.get("rope_type", given.get("type")) or "default")
    kind = OLD_NAMES.get(kind, kind)
    if kind not in KEYS:
        fix = f"supported: {', '.join(KEYS)}"
        raise UserError(f"rope type {kind!r} is not supported", where="config.json", fix=fix)
    unknown = sorted(key for key in given.keys() - COMMON - KEYS[kind] if given[key] is not None)
    if unknown:
        fix = f"supported: {', '.join(sorted(KEYS[kind]))}"
        raise UserError(f"rope type {kind!r} has no setting {unknown[0]!r}", where="config.json", fix=fix)
    _check_values(kind, given)
    theta = given.get("rope_theta") or config.get("rope_theta") or theta
    everywhere = config.get("partial_rotary_factor")
    part = given.get("partial_rotary_factor") or everywhere or 1.0
    dim = int(head_dim * part)
    try:
        scaling = _scaling(kind, given, config, theta)
        scale = None if beta is None else QueryScale(
            beta=beta, original_max_positions=given["original_max_position_embeddings"]
        )
    except KeyError as error:
        fix = "take it from the published file of the model"
        raise UserError(f"rope type {kind!r} needs {error.args[0]!r}", where="config.json", fix=fix) from None
    if part > 1 or (isinstance(scaling, LongScaling) and {len(scaling.short), len(scaling.long)} != {dim // 2}):
        lists = f"short_factor and long_factor need {dim // 2} entries"
        what = f"partial_rotary_factor is {part}" if part > 1 else lists
        raise UserError(f"{what}: a head has {head_dim} channels", where="config.json", fix="see the published file")
    return Rope(
        dim=dim, theta=theta, interleaved=interleaved, scaling=scaling, query_scale=scale
    )


def ropes(config: dict, head_dim: int, *, theta: float, local_theta: float) -> dict[str, Rope]:
    """Ropes by layer type. A config with one rope means full attention; sliding layers then have a plain one."""
    given = _given(config, ("rope_parameters",))
    local = {"rope_type": "default", "rope_theta": local_theta}
    if not any(isinstance(value, dict) for value in given.values()):
        kinds = {"full_attention": config, "sliding_attention": config | {"rope_parameters": local}}
    else:
        odd = [kind for kind, value in given.items() if kind not in KINDS or not isinstance(value or {}, dict)]
        if odd or len(given) < len(KINDS):
            what = f"has no place for {odd[0]!r}" if odd else f"speaks of {next(iter(given))} alone"
            fix = f"supported: settings for each of {', '.join(KINDS)}"
            raise UserError(f"rope_parameters {what}", where="config.json", fix=fix)
        base = config | {"rope_theta": None}
        kinds = {kind: base | {"rope_parameters": value or local} for kind, value in given.items()}
    defaults = {"full_attention": theta, "sliding_attention": local_theta}
    return {kind: rope(one, head_dim, theta=defaults.get(kind, theta)) for kind, one in kinds.items()}


def _given(config: dict, keys: tuple[str, ...]) -> dict:
    """The first of `keys` that says something, to be changed at will."""
    for key in keys:
        if given := config.get(key):
            if not isinstance(given, dict):
                fix = 'write settings: {"rope_type": "yarn", "factor": 4.0, …}, or null'
                raise UserError(f"{key} is {given!r}", where="config.json", fix=fix)
            return dict(given)
    return {}


def _check_values(kind: str, given: dict) -> None:
    """UserError for a setting that is no number where one is needed."""
    for key, value in given.items():
        if key in ("rope_type", "type") or (value is None and key not in NEEDED.get(kind, ())):
            continue
        what = "a positive number"
        if key == "truncate":
            what, right = "true or false", isinstance(value, bool)
        elif key in ("short_factor", "long_factor"):
            what, right = "a list of positive numbers", isinstance(value, list) and all(map(is_number, value))
        else:
            right = is_number(value) or (key.startswith("mscale") and value == 0)
        if not right:
            said = f"{key} of rope type {kind!r} must be {what}, and it is {value!r}"
            raise UserError(said, where="config.json", fix="take it from the published file of the model")


def _scaling(kind: str, given: dict, config: dict, theta: float) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=given["factor"])
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if kind == "llama3":
        return Llama3Scaling(
            factor=given["factor"],
            low_freq_factor=given["low_freq_factor"],
            high_freq_factor=given["high_freq_factor"],
            original_max_positions=given["original_max_position_embeddings"],
        )
    original = original or config["max_position_embeddings"]
    factor = given.get("factor") if kind == "longrope" else given["factor"]
    factor = factor or config["max_position_embeddings"] / original
    gain = given.get("attention_factor")
    if kind == "longrope":
        if gain is None:
            gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = tuple(given["short_factor"]), tuple(given["long_factor"])
        return LongScaling(short=short, long=long, original_max_positions=original, gain=gain)
    if gain is None:
        gain = _yarn_gain(factor, given.get("mscale"), given.get("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        theta=theta,
        original_max_positions=original,
        beta_fast=given.get("beta_fast") or 32,
        beta_slow=given.get("beta_slow") or 1,
        gain=gain,
        truncate=given.get("truncate", True),
    )


def _yarn_gain(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    def gain(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    return gain(mscale) / gain(mscale_all) if mscale and mscale_all else gain(1.0)
