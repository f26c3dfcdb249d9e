"""Model families: config.json -> Arch, and how checkpoint keys map to parameters. One file each."""

from ftlib.errors import UserError, did_you_mean
from ftlib.models.arch import Arch
from ftlib.models.families import llama, mistral, qwen2, qwen3
from ftlib.models.families.common import Family
from ftlib.models.keys import Table

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
    for model_type in family.model_types
}


def read(config: dict, where: str = "config.json") -> tuple[Arch, Table]:
    """Architecture and key table of a config.json; UserError for anything that is not supported, never a guess."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported{did_you_mean(str(model_type), FAMILIES)}",
            where=where,
            fix=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    family = FAMILIES[model_type]
    return family.arch(config), family.table(config)
