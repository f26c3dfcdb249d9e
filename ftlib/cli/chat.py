"""Talk to a model in the terminal.

    tune chat MODEL [--adapter DIR]

    /reset         forget the conversation          /system TEXT   start anew with a system message
    /undo          forget the last turn             /save FILE     append the conversation to a file of rows
    /help          this list                        /quit          leave (also Ctrl-D); Ctrl-C ends an answer
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.cli import sampling
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ftlib.cli.talk import Talk

COMMANDS = ("/reset", "/system", "/undo", "/save", "/help", "/quit")


def main(argv: Sequence[str]) -> int:
    """`tune chat MODEL [--adapter DIR] …`"""
    args = _parse(argv)
    from ftlib.cli.talk import Talk  # imports torch

    talk = Talk.open(args)
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401 - gives input() line editing and a history
        except ImportError:
            pass  # not on every platform
        print(f"{args.model} on {talk.device}; /help lists the commands")
    while (said := _ask()) is not None:
        try:
            if said.startswith("/"):
                if _command(talk, *said.partition(" ")[::2]):
                    break
            elif said.strip():
                talk.answer(said, write=lambda text: print(text, end="", flush=True))
                print()
        except UserError as error:  # a slip in one line does not end the conversation
            print(f"error: {error}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("chat", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id, ftlib:demo/model, or an adapter's folder")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format for MODEL")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    sampling.add_options(parser, sampling.TALKING)
    parser.add_template_arg()
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse(argv)
    sampling.check("chat", args)
    return args


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _command(talk: "Talk", name: str, rest: str) -> bool:
    """Do what a line with a slash says; true if it ends the conversation."""
    if name == "/reset":
        talk.reset()
    elif name == "/system":
        talk.reset(rest.strip())
    elif name == "/undo":
        talk.undo()
    elif name == "/save":
        if not rest.strip():
            raise UserError("/save needs a file", fix="/save talk.jsonl")
        path = Path(os.path.expanduser(rest.strip()))
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        print(f"saved {len(talk.messages)} messages to {path}")
    elif name == "/help":
        print("\n".join(line[4:] for line in __doc__.splitlines() if line.startswith("    /")))
    elif name != "/quit":
        raise UserError(f"no command {name}{did_you_mean(name, COMMANDS)}", fix=f"one of {', '.join(COMMANDS)}")
    return name == "/quit"
