"""Copy a recipe or a config that ships with ftlib, to edit it.

    tune cp recipes/lora_sft.py my.py
    tune cp demo_lora my.yaml
    tune cp model:qwen3 my_model.py      # a model family as one file, for `model.code: my_model.py:Decoder`

The first line of the copy says what it was copied from; `tune diff` reads it. The original is kept beside the copy, as
`.NAME.orig`, for `tune update`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli import assets, copies
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune cp NAME DEST [--force]`"""
    parser = Parser("cp", __doc__)
    parser.add_argument("name", metavar="NAME", help="a name that `tune ls` prints")
    parser.add_argument("dest", metavar="DEST", help="a file that does not exist yet, or a folder")
    parser.add_argument("--force", action="store_true", help="replace DEST if it exists")
    args = parser.parse(argv)
    if args.name.startswith("model:"):
        dest = _copy(args.name, f"{args.name.removeprefix('model:')}.py", args.dest, args.force)
        print(f"  train it: model.code={dest}:Decoder")
        return 0
    found = assets.find_shipped("recipes", args.name) or assets.find_shipped("configs", args.name)
    if found is None:
        kind = "configs" if args.name.startswith("configs/") or args.name.endswith((".yaml", ".yml")) else "recipes"
        hint = assets.suggestion(kind, args.name) or assets.suggestion("configs", args.name)
        raise UserError(f"{args.name}: ftlib ships nothing of this name{hint}", fix="`tune ls` lists what there is")
    _copy(found[0], found[1].name, args.dest, args.force)
    return 0


def _copy(name: str, file: str, to: str, force: bool) -> Path:
    """Write what ships as `name`, to `file` where `to` is a folder."""
    dest = _free(to, file, force)
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        copies.write(dest, name)
    except OSError as error:
        raise UserError(f"{dest} cannot be written: {error.strerror}") from None
    print(f"{name} -> {dest}")
    return dest


def _free(text: str, name: str, force: bool) -> Path:
    """The file to write; `name` is for a folder."""
    dest = Path(os.path.expanduser(text))
    if dest.is_dir() or text.endswith("/"):
        dest = dest / name
    if dest.exists() and not force:
        raise UserError(f"{dest} exists and stays as it is", fix="name another file, or add --force to replace it")
    if not dest.parent.exists() and not dest.resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{dest.parent}: no such folder", fix="make it first, or name a file below this one")
    return dest
