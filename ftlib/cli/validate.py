"""Run every check of a recipe and its config, without a GPU and without training.

    tune validate RECIPE --config FILE [--config FILE …] [key=value …] [--world N]
    tune validate --nproc-per-node N [other options of torchrun] RECIPE --config FILE …

--world N checks for N processes (default: 1), options of torchrun for those that `tune run` would start with them.
Every problem is reported at once; exit code 2 if there is any.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ftlib.cli import recipe
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune validate RECIPE --config F [k=v] [--world N]`"""
    if any(word in ("-h", "--help") for word in argv):
        print(__doc__.strip())
        return 0
    world, argv = _take_world(argv)
    together: AbstractContextManager[None] = nullcontext()
    if recipe.starts_processes("validate", argv):
        from ftlib.cli import spawn  # imports torch

        if world is not None:
            raise UserError("tune validate: --world beside options of torchrun", fix="leave --world out")
        args, local, world = spawn.parse("validate", argv)
        together = spawn.sharing(local)
        argv = [args.training_script, *args.training_script_args]
    path = recipe.find(argv[0], "validate")
    arguments = recipe.with_shipped_configs(argv[1:])
    with together:
        found = recipe.check(path, arguments, world or 1)
    for line in found:
        print(line)
    print(f"ok: {path} {' '.join(argv[1:])}".rstrip())
    return 0


def _take_world(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    words, rest, world = list(argv), [], None
    while words:
        word = words.pop(0)
        if word == "--world":
            world = words.pop(0) if words else ""
        elif word.startswith("--world="):
            world = word.removeprefix("--world=")
        else:
            rest.append(word)
    if world is not None and (not world.isdecimal() or int(world) < 1):
        raise UserError(f"tune validate: --world needs a number of processes, got {world!r}")
    return world and int(world), rest
