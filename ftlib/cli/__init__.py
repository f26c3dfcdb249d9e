"""`tune`: one small module per verb, imported when the verb is used."""

import importlib
import keyword
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from ftlib import __version__
from ftlib.errors import UserError, did_you_mean, of_system, plain_warning

VERBS = {
    "init": "write a config for a file of rows and a model",
    "run": "run a recipe, on one device or on many",
    "validate": "check a recipe and its config without training",
    "plan": "say what a run would take of each GPU, which settings fit, and how many GPUs it needs",
    "ls": "list the recipes and configs that ship with ftlib",
    "cp": "copy a recipe or a config, to edit it",
    "diff": "compare a copy with the version that ships now",
    "update": "bring what has changed in the shipped version into a copy",
    "prepare": "fetch and tokenise the data of a run, so that it starts from disk",
    "doctor": "look a data set over: shape, lengths, masks, repeats, broken rows",
    "preview": "show rendered rows and which of their tokens are trained",
    "generate": "answer a prompt with a model, with or without an adapter",
    "chat": "talk to a model in the terminal",
    "eval": "score a model on held-out rows, without training",
    "serve": "serve a model over OpenAI's HTTP interface",
    "merge": "write a model with its adapter merged in, or any checkpoint as a model",
    "gguf": "write a model as one file for llama.cpp and Ollama",
    "download": "fetch a model from the Hugging Face Hub",
    "push": "upload an adapter or a model with a card to the Hugging Face Hub",
    "import": "turn a config of Axolotl, torchtune, TRL or LLaMA-Factory into one of ours",
    "env": "show versions and devices, and what to install",
    "completion": "print the completion script of a shell",
    "help": "explain a verb, or every key of a config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 a user's mistake (one message on stderr), others as the run's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = plain_warning
    try:
        return _dispatch(argv)
    except UserError as error:
        from ftlib.launch import message

        print(message(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tune ls | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (refused := of_system(error)) is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code


def _dispatch(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print(overview())
        code = 0
    elif verb in ("-V", "--version"):
        print(f"ftlib {__version__}")
        code = 0
    elif verb not in VERBS:
        kind = "option" if verb.startswith("-") else "verb"
        raise UserError(f"unknown {kind} {verb!r}{did_you_mean(verb, VERBS)}", fix=f"one of {', '.join(VERBS)}")
    else:
        code = module(verb).main(rest)
    sys.stdout.flush()
    return code


def module(verb: str) -> ModuleType:
    """The module of a verb; one that Python keeps for itself has a `_` behind it."""
    return importlib.import_module(f"ftlib.cli.{verb}{'_' if keyword.iskeyword(verb) else ''}")


def overview() -> str:
    """What `tune --help` prints."""
    width = max(map(len, VERBS))
    lines = ["usage: tune VERB …   (or python -m ftlib VERB …)", ""]
    lines += [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    lines += ["", "tune VERB --help says more; `tune help config RECIPE` lists every key of a recipe's config."]
    return "\n".join(lines)
