"""What the launcher says of a job's processes, by the environment variables that torchrun sets."""

import os

from ftlib.errors import UserError


def world_size() -> int:
    """Processes of this job; 1 where no launcher said anything."""
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Which of them this one is, from 0."""
    number, world = _number("RANK", 0, least=0), world_size()
    if number >= world:
        raise _wrong(f"RANK is {number}, and WORLD_SIZE {world} has ranks 0 to {world - 1}", "RANK, WORLD_SIZE")
    return number


def check() -> None:
    """UserError where variables that only a launcher should set say of others which nobody could reach."""
    rank()
    if world_size() == 1:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        what = f"WORLD_SIZE is {world_size()}, and of what goes with it there is no {' and no '.join(missing)}"
        raise _wrong(what, ", ".join(["WORLD_SIZE", *missing]))
    _number("MASTER_PORT", 0, least=1)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise _wrong(f"{name} is {text!r}, and should be a whole number from {least}", name)
    return int(text)


def _wrong(what: str, names: str) -> UserError:
    fix = "unset them, and start several processes by tune run --nproc-per-node N or torchrun, which set them"
    return UserError(what, where=f"{names} (environment)", fix=fix)
