"""What `generate` and `chat` share: options of sampling, what the model's folder says of it, drawing up to a text."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.generation import Engine, SamplingParams
    from ftlib.tokenizers import Tokenizer

TALKING, ANSWERING = 0.7, 0.0  # temperatures where neither the command line nor the model's folder says one


@dataclass(frozen=True)
class Drawn:
    """A completion as text, without the stop text that ended it; `reason`: stop, or length where it was cut off."""

    text: str
    reason: str


def add_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Options of a draw; what is left out is as generation_config.json has it, or else as without the option."""
    own = f"default: the model's own, or {temperature:g}"
    parser.add_argument("--temperature", type=float, metavar="T", help=f"0: the likeliest token; {own}")
    parser.add_argument("--top-p", type=float, metavar="P", help="the likeliest tokens that together reach P")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens; 0: all")
    parser.add_argument("--min-p", type=float, metavar="P", help="those at least P times as likely as the first")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws when the temperature is above 0")


def check(verb: str, args: argparse.Namespace) -> None:
    """UserError for a number that cannot be, before anything is loaded."""
    bounds = {
        "--max-new-tokens is at least 1": args.max_new_tokens < 1,
        "--temperature is at least 0": (args.temperature or 0) < 0,
        "--top-p is above 0, at most 1": args.top_p is not None and not 0 < args.top_p <= 1,
        "--top-k is at least 0": (args.top_k or 0) < 0,
        "--min-p is from 0 to 1": not 0 <= (args.min_p or 0) <= 1,
        "--stop is a text": "" in args.stop,
    }
    if any(bounds.values()):
        raise UserError(f"tune {verb}: " + "; ".join(rule for rule, broken in bounds.items() if broken))


def params(args: argparse.Namespace, tokenizer: "Tokenizer", temperature: float) -> "SamplingParams":
    """The options of `add_options` over what generation_config.json says over `temperature`; a note says what it said.

    As transformers has it, the file's numbers count where its `do_sample` is true. Its `eos_token_id` always does
    (`Tokenizer.stop_ids`).
    """
    from ftlib.generation.params import READ, SamplingParams, listed

    own = listed(tokenizer.files.generation)
    asked = {key: getattr(args, key) for key in READ if getattr(args, key) is not None}
    if taken := ", ".join(f"{key}={value}" for key, value in own.items() if key not in asked):
        print(f"sampling as generation_config.json says: {taken}", file=sys.stderr)
    usual = 1.0 if tokenizer.files.generation.get("do_sample") else temperature
    how = {"temperature": usual, **own, **asked}
    return SamplingParams(args.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=args.seed, logprobs=False, **how)


def draw(
    engine: "Engine",
    tokenizer: "Tokenizer",
    prompts: Sequence[list[int]],
    params: "SamplingParams",
    n: int = 1,
    stops: Sequence[str] = (),
    write: Callable[[str], None] = lambda text: None,
) -> list[list[Drawn]]:
    """`n` completions of each prompt (token ids). One ends where the engine ends it, or before one of `stops`; `write`
    hears of each piece of text."""
    from ftlib.serving.text import GrowingText

    growing, texts, ended = {}, {}, []

    def hear(request: object, token: int) -> None:
        grown = growing[request]
        if grown.stopped:
            return
        piece = grown.push(token)
        texts[request].append(piece)
        write(piece)
        if grown.stopped:
            ended.append(request)

    requests = []
    for i, prompt in enumerate(prompts):
        requests += engine.submit(prompt, params, n, first=i * n, on_token=hear)
    for request in requests:
        growing[request], texts[request] = GrowingText(tokenizer, stops), []
    try:
        while engine.busy:
            engine.step()
            while ended:
                engine.abort(ended.pop())
    except BaseException:  # Ctrl-C may come anywhere
        engine.clear()
        raise
    done = []
    for request in requests:
        last = growing[request].finish()
        write(last)
        stopped = growing[request].stopped or request.finish_reason == "stop"
        done.append(Drawn("".join(texts[request]) + last, "stop" if stopped else "length"))
    return [done[i * n : (i + 1) * n] for i in range(len(prompts))]
