"""Answer prompts with a model: a folder, a Hub id, `ftlib:demo/model`, or the folder of an adapter.

    tune generate MODEL [--adapter DIR] --prompt "What is 2+2?"
    tune generate MODEL --prompts questions.jsonl --out answers.jsonl

A model with a chat template gets the prompt as a user's message; --raw continues the bare text. The answer goes to
stdout, everything else to stderr. Rows of --prompts have a `prompt`, or `messages` whose last answer is left out; they
come back with an `answer`, its `finish_reason` and `sample`, its number of -n. What the command line leaves out of
sampling, the model's generation_config.json says. A model of recipes/diffusion.py restores --max-new-tokens hidden
ones, the surest first, one in a round.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.cli import sampling
from ftlib.cli.arguments import Parser, result_file
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.models import LanguageModel
    from ftlib.tokenizers import Tokenizer


def main(argv: Sequence[str]) -> int:
    """`tune generate MODEL [--adapter DIR] --prompt T …`"""
    args = _parse(argv)
    rows = list(_rows(args.prompts)) if args.prompts else []
    from ftlib.cli import loading  # torch comes here, so that a wrong option answers at once
    from ftlib.generation import Engine

    model, tokenizer, _, base, adapter = loading.named(args, masked=True)
    tokenizer.set_template_args(args.template_arg, "--template-arg")
    if not args.prompts:
        rows = [("", {"prompt": sys.stdin.read() if args.prompt[0] == "-" else args.prompt[0]})]
    prompts = [_encode(tokenizer, place, _messages(row, args.system), args.raw) for place, row in rows]
    if mask := loading.mask_token(base, adapter):
        _check_restored(args)
        print(_restored(model, tokenizer, prompts[0], mask, args))
        return 0
    params = sampling.params(args, tokenizer, sampling.ANSWERING)
    drawn = sampling.draw(Engine(model, compile="graphs"), tokenizer, prompts, params, args.n, args.stop)
    if args.prompts:
        _write(args.out, [row for _, row in rows], drawn)
    else:
        print("\n---\n".join(one.text for one in drawn[0]))
    if cut := sum(one.reason == "length" for answers in drawn for one in answers):
        which = f"{cut} answers " if args.prompts or args.n > 1 else ""
        print(f"({which}cut off after --max-new-tokens {args.max_new_tokens})", file=sys.stderr)
    return 0


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it is, and the row, of each in a file of prompts, of any kind that training reads; UserError names the line
    of a wrong one."""
    from ftlib.data.sources import files_of, read_all
    from ftlib.sections import Source

    for file, row in read_all(files_of(Source(path=name))):
        if isinstance(row.value, UserError):
            raise row.value
        messages = row.value.get("messages")
        talk = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
        if not talk and (messages or not isinstance(row.value.get("prompt"), str)):
            what = f"a row of prompts has a text `prompt`, or a list of `messages`; this has {', '.join(row.value)}"
            raise UserError(what, where=f"{file}:{row.line}", fix="name the column that asks so")
        yield f"{file}:{row.line}", row.value


def _messages(row: dict[str, Any], system: str | None) -> list[dict[str, Any]]:
    """What a row asks, as a conversation that the model answers; `system` where it has no system message of its own."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    messages = messages[:-1] if len(messages) > 1 and messages[-1].get("role") == "assistant" else messages
    own = system is None or messages[0].get("role") == "system"
    return messages if own else [{"role": "system", "content": system}, *messages]


def _write(out: Path | None, rows: list[dict[str, Any]], drawn: list[list[sampling.Drawn]]) -> None:
    """A line of JSON for each answer: its row, and what was drawn."""
    answered = [
        {**row, "answer": one.text, "finish_reason": one.reason, "sample": k}
        for row, answers in zip(rows, drawn, strict=True)
        for k, one in enumerate(answers)
    ]
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in answered]
    if out is None:
        print("\n".join(lines))
    else:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(lines)} answers -> {out}", file=sys.stderr)


def _check_restored(args: argparse.Namespace) -> None:
    """UserError for options that only what predicts the next token has."""
    given = {"--prompts": args.prompts, "-n": args.n > 1, "--top-p": args.top_p, "--top-k": args.top_k}
    given |= {"--min-p": args.min_p, "--stop": args.stop}
    if wrong := [option for option, value in given.items() if value]:
        what = "a model of recipes/diffusion.py restores hidden tokens of one --prompt"
        raise UserError(what, where=", ".join(wrong), fix=f"leave {' and '.join(wrong)} out")


def _restored(
    model: "LanguageModel", tokenizer: "Tokenizer", prompt: list[int], mask: str, args: argparse.Namespace
) -> str:
    """The text behind a prompt up to where it ends, of a model that looks both ways."""
    from ftlib.losses.diffusion import sample

    length, how = args.max_new_tokens, {"temperature": args.temperature or 0.0, "seed": args.seed}
    (ids,) = sample(model, [prompt], length, tokenizer.special_tokens[mask], steps=length, **how)
    return tokenizer.decode(list(takewhile(lambda i: i not in tokenizer.stop_ids, ids)), skip_special=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("generate", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format for MODEL")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="the text; - reads it from stdin")
    asked.add_argument("--prompts", metavar="F.jsonl", help="a file of rows, each with a `prompt` or `messages`")
    parser.add_argument("--out", metavar="F.jsonl", help="where rows with their answers go (default: stdout)")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)")
    parser.add_argument("--system", help="a system message for prompts that have none")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sampling.add_options(parser, sampling.ANSWERING)
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text itself")
    parser.add_template_arg()
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse(argv)
    sampling.check("generate", args)
    if len(args.prompt or ()) > 1:
        raise UserError(f"{len(args.prompt)} prompts", where="--prompt", fix="write them to a file: --prompts F.jsonl")
    if args.n < 1 or (args.out and not args.prompts):
        raise UserError("tune generate: -n is at least 1, and --out goes with --prompts")
    args.out = result_file(args.out)
    if args.raw and (args.system is not None or args.template_arg):
        option = "--template-arg" if args.system is None else "--system"
        raise UserError(f"tune generate: {option} needs the chat template that --raw leaves out")
    return args


def _encode(tokenizer: "Tokenizer", place: str, messages: list[dict[str, Any]], raw: bool) -> list[int]:
    if raw or tokenizer.chat_template is None:
        if len(messages) > 1:
            what = "several messages, --system being one, need a chat template to be placed"
            raise UserError(what, fix="leave --raw out" if raw else "put it all in one prompt: this model has none")
        return tokenizer.encode(messages[0]["content"], bos=tokenizer.bos_id is not None)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except UserError as error:
        where = ", ".join(filter(None, (place, error.where)))
        raise UserError(error.what, where=where or None, fix=error.fix) from None
