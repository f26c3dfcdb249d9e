"""Model families: config.json -> Arch, and how checkpoint keys map to parameters. One file each."""

from dataclasses import replace

from ftlib.errors import UserError, did_you_mean
from ftlib.models import ssmax
from ftlib.models.arch import Arch
from ftlib.models.families import (
    arcee,
    ernie4_5,
    exaone4,
    gemma,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    hunyuan,
    llama,
    mistral,
    mixtral,
    olmo,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
)
from ftlib.models.families.common import Family
from ftlib.models.families.flags import check_flags
from ftlib.models.families.watched import Watched
from ftlib.models.keys import Table

MODULES = (
    arcee, ernie4_5, exaone4, glm4, glm4_moe, gpt_oss, granite, hunyuan, llama, mistral, mixtral, olmo, olmoe, phi3,
    qwen2, qwen2_moe, qwen3, qwen3_moe, seed_oss, smollm3,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (*(module.FAMILY for module in MODULES), *gemma.FAMILIES, mistral.MINISTRAL3_FAMILY)
    for model_type in family.model_types
}
# Checkpoints of a vision model around a language model: we train the latter and carry the rest along.
WRAPPED = ("gemma3", "mistral3")
AROUND = Table(prefix="language_model.", keep=(r"vision_tower\..*", r"multi_modal_projector\..*"))
NAME = "config.json"
NEW = "; of another, model.code: tools/new_family.py drafts a file for it (ftlib/models/README.md: own a family)"
# As many as heads, the hidden size over the heads, and none: not the same as left out.
NULL_SAYS = ("num_key_value_heads", "head_dim", "sliding_window")


def read(config: dict, where: str = NAME, own: Family | None = None) -> tuple[Arch, Table]:
    """Architecture and key table of a config.json; UserError for anything that is not supported, never a guess.

    `own`: a user's family, the only one that is asked then.
    """
    known = FAMILIES if own is None else dict.fromkeys(own.model_types, own)
    if config.get("model_type") in WRAPPED and isinstance(config.get("text_config"), dict):
        inner = dict(config["text_config"])
        inner.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", config["model_type"] == "gemma3"))
        arch, table = read(inner, where, own)
        return arch, replace(table, prefix=AROUND.prefix, keep=AROUND.keep)
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type.endswith(ssmax.SUFFIX):
        plain = {k: v for k, v in config.items() if k != ssmax.START}
        arch, table = read(plain | {"model_type": model_type.removesuffix(ssmax.SUFFIX)}, where, own)
        return ssmax.applied(arch, config.get(ssmax.START), where), table
    if model_type not in known:
        raise UserError(
            f"model_type {model_type!r} is not supported{did_you_mean(str(model_type), known)}",
            where=where,
            fix=f"supported: {', '.join(sorted([*known, *WRAPPED]))}" + NEW * (own is None),
        )
    family = known[model_type]
    given = {k: v for k, v in config.items() if v is not None or k not in family.defaults or k in NULL_SAYS}
    watched = Watched(family.defaults | given)
    try:
        arch, table = family.arch(watched), family.table(watched)
    except UserError as error:  # families know the file by its name alone
        raise UserError(error.what, where=where if error.where == NAME else error.where, fix=error.fix) from None
    check_flags(watched, where)
    return arch, table
