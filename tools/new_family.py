"""Draft a family file from a config.json, and say which checkpoint tensors it does not explain yet.

    python tools/new_family.py FOLDER [--like qwen3] > my_family.py

It runs from a clone of the repository, as tools/ is in no wheel. FOLDER holds config.json and, if you have them,
*.safetensors or model.safetensors.index.json: only names are read. The draft is a whole `model.code` file, which
starts as a copy of the family named by --like.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.errors import UserError  # noqa: E402
from ftlib.models import families, hub, load  # noqa: E402
from ftlib.models.arch import Arch  # noqa: E402
from ftlib.models.decoder import Decoder  # noqa: E402
from ftlib.models.families.flags import NEUTRAL, unread  # noqa: E402
from ftlib.models.families.watched import Watched  # noqa: E402
from ftlib.models.keys import plan  # noqa: E402

DRAFT = '''"""{model_type}: what makes it different from {like}, in a line."""

from dataclasses import replace

from ftlib.models.decoder import Decoder as Base
from ftlib.models.families import FAMILIES

LIKE = FAMILIES["{like}"]


def {name}(config: dict):  # -> ftlib.models.arch.Arch
    return LIKE.arch(config)


class Decoder(Base):
    family = replace(LIKE, model_types=("{model_type}",), arch={name})
'''


def tensor_names(folder: Path) -> set[str]:
    """Names in the index, or in the headers of the files; empty when there are no weights."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        names |= header.keys() - {"__metadata__"}
    return names


def differences(folder: Path, like: str) -> list[str]:
    """What stands between `like` and this model: flags it refuses, and tensors that differ, layers written as {i}."""
    config = hub.read_config(folder)
    lines = [f"flag to look at: {key} = {config[key]!r}" for key in NEUTRAL if config.get(key) not in (None, False, 0)]

    class Like(Decoder):
        family = None

    family = families.FAMILIES[like]
    strange: list[str] = []

    def arch(given: Watched) -> Arch:
        found = family.arch(given)
        strange.extend(unread(given))
        given.seen.update(strange)  # told below, so that names can be compared nevertheless
        return found

    Like.family = replace(family, model_types=(str(config.get("model_type")),), arch=arch)
    try:
        model = load.build(folder, torch.bfloat16, Like)
    except UserError as error:
        return [*lines, *str(error).splitlines()]
    lines += [f"key that nothing reads: {key} = {config[key]!r}" for key in strange]
    pieces, found = plan(load.base_state(model), model.table), tensor_names(folder)
    if model.arch.tied:  # the head is the embedding, and a file may hold it once more
        found -= set(pieces.pop("lm_head.weight").keys)
    wanted = {key for piece in pieces.values() for key in piece.keys}
    if not found:
        return [*lines, "no weights here: names were not compared"]
    lines += [f"missing in the files: {name}" for name in _general(wanted - found)]
    return lines + [f"not explained: {name}" for name in _general(found - wanted)]


def _general(names: set[str]) -> list[str]:
    return sorted({re.sub(r"\.\d+\.", ".{i}.", name) for name in names if not name.endswith("rotary_emb.inv_freq")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", default="llama", choices=sorted(families.FAMILIES))
    args = parser.parse_args()
    try:
        model_type = str(hub.read_config(args.folder).get("model_type"))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    name = re.sub(r"\W", "_", model_type)
    print(DRAFT.format(model_type=model_type, like=args.like, name=name))
    for line in differences(args.folder, args.like):
        print(f"# {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
