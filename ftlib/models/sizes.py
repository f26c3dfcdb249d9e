"""The config.json of a family in other sizes."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from torch import nn

from ftlib.errors import UserError
from ftlib.models import families, ssmax
from ftlib.models.hub import read_config
from ftlib.models.mtp import FOLDER as MTP
from ftlib.sections.sizes import Context, Sizes

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how many there are, by families' names for it
ROUND = 64  # a width that is derived is a multiple of this


def resized(config: dict, sizes: Sizes) -> dict:
    """`config` with the sizes that are set, and what follows from them; every flag stays. UserError if they do not fit.

    Heads keep their size where it divides the new width, layers repeat the family's pattern of layer types.
    """
    new = dict(config)
    old_dim, old_heads = config["hidden_size"], config["num_attention_heads"]
    old_head = config.get("head_dim") or old_dim // old_heads
    dim, head = sizes.dim or old_dim, sizes.head_dim or old_head
    heads = sizes.heads or (max(1, dim // head) if (dim, head) != (old_dim, old_head) else old_heads)
    if not sizes.head_dim and (not config.get("head_dim") or old_head * old_heads == old_dim):
        if dim % heads:
            raise UserError(f"dim {dim} is no multiple of {heads} heads", where="sizes", fix="set sizes.heads")
        head = dim // heads
    if head % 2:
        what = f"{heads} heads of dim {dim} have {head} channels each, which cannot turn in pairs"
        raise UserError(what, where="sizes", fix="set sizes.dim, sizes.heads or sizes.head_dim so that it is even")
    ratio = old_heads // (config.get("num_key_value_heads") or old_heads)
    kv_heads = sizes.kv_heads or max(1, heads // ratio)
    if heads % kv_heads:
        raise UserError(f"{heads} heads are no multiple of {kv_heads}", where="sizes.kv_heads", fix="set a divisor")
    new |= {"hidden_size": dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if config.get("query_pre_attn_scalar") == config.get("head_dim", -1):
        new["query_pre_attn_scalar"] = head
    if "head_dim" in config or head * heads != dim:
        new["head_dim"] = head
    for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if key in config:
            new[key] = sizes.hidden or _in_proportion(config[key], dim, old_dim)
    if sizes.vocab:
        new["vocab_size"] = sizes.vocab
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):  # of the published tokenizer
            ids = new.get(key)
            if max(ids if isinstance(ids, list) else [ids or 0]) >= sizes.vocab:
                new[key] = None
    return _layers(_experts(new, sizes), sizes.layers or config["num_hidden_layers"])


def note(config: dict, sizes: Sizes) -> list[str]:
    """A line where heads keep a size that does not follow from the sizes that are set."""
    new = resized(config, sizes)
    dim, heads, head = new["hidden_size"], new["num_attention_heads"], new.get("head_dim") or 0
    if sizes.head_dim or not (sizes.dim or sizes.heads) or head * heads in (0, dim):
        return []
    return [f"heads keep the published {head} channels: {heads} of them, and dim is {dim}; sizes.head_dim sets it"]


def _experts(config: dict, sizes: Sizes) -> dict:
    if not (sizes.experts or sizes.experts_per_token):
        return config
    where, keys = "sizes.experts, sizes.experts_per_token", EXPERTS
    if not (keys := [key for key in keys if config.get(key)]):
        raise UserError("the model has no experts", where=where, fix="leave them out, or name a mixture in model.path")
    experts = sizes.experts or config[keys[0]]
    taken = sizes.experts_per_token or config.get("num_experts_per_tok", 1)
    if taken > experts:
        what = f"each token would go to {taken} experts, and there are {experts}"
        raise UserError(what, where=where, fix=f"set sizes.experts_per_token={experts}, or less")
    names = [key for key in ("num_experts_per_tok", "experts_per_token") if key in config]
    return config | dict.fromkeys(keys, experts) | dict.fromkeys(names, taken)


def _in_proportion(size: int, dim: int, old_dim: int) -> int:
    return size if dim == old_dim else max(ROUND, round(size * dim / old_dim / ROUND) * ROUND)


def _layers(config: dict, count: int) -> dict:
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            pattern = config[key]
            config[key] = [pattern[i % len(pattern)] for i in range(count)]
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] = min(config["max_window_layers"], count)
    return config | {"num_hidden_layers": count}


def extended(config: dict, length: int) -> dict:
    """`config` for sequences of `length` tokens: YaRN (Peng et al. 2023, arXiv 2309.00071) from the range it has.

    UserError where the range is not said, is that long already, or is scaled in another way.
    """
    had, where = config.get("max_position_embeddings"), "context.length"
    old = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = old.get("rope_type", old.get("type", "default"))
    if not had or length <= had:
        raise UserError(f"the model's range is {had} tokens", where=where, fix="ask for more, or leave it out")
    if kind != "default" or any(isinstance(value, dict) for value in old.values()):
        what = f"the model's rope is scaled already ({kind})" if kind != "default" else "its layers have several ropes"
        raise UserError(what, where=where, fix="edit its config.json")
    yarn = {"rope_type": "yarn", "factor": length / had, "original_max_position_embeddings": had}
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    kept = {name: value for name, value in old.items() if name not in ("type", "rope_type")}
    return config | {key: kept | yarn, "max_position_embeddings": length}


def write(
    source: Path,
    folder: Path,
    sizes: Sizes,
    context: Context = Context(),
    weights: bool = False,
    decoder: type[nn.Module] | None = None,
) -> Path:
    """A folder below `folder` with the config.json of `source` in other sizes, for a longer range or with scalable
    softmax, whose name tells them apart; with `weights` also links to those of `source`.
    `decoder`: what is to read it, as in `load.build`.

    UserError where the family cannot have them. Any number of processes may write it at once.
    """
    config = read_config(source)
    if "text_config" in config:
        what = "sizes are for language models, and this one is inside another"
        raise UserError(what, where=str(source / "config.json"), fix="name a model without towers")
    new = resized(config, sizes) if sizes.changed else config
    length = context.length
    new = extended(new, length) if length and new.get("max_position_embeddings") != length else new
    new = new if context.ssmax is None else ssmax.configured(new, context.ssmax)
    families.read(new, "sizes", getattr(decoder, "family", None))
    text = json.dumps(new, indent=2) + "\n"
    made = folder.absolute() / f"shape-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not (made / "config.json").is_file():
        made.mkdir(parents=True, exist_ok=True)
        part = made / f".{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        os.replace(part, made / "config.json")
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", made / "generation_config.json")
    for file in (*source.glob("*.safetensors*"), *source.glob(MTP)) if weights else ():
        with contextlib.suppress(FileExistsError):
            (made / file.name).symlink_to(file.resolve())
    return made
