"""Answer a prompt with a model: a folder, a Hub id, `ftlib:demo/model`, or the folder of an adapter.

    tune generate MODEL [--adapter DIR] --prompt "What is 2+2?"

A model with a chat template gets the prompt as a user's message; --raw continues the bare text. The answer goes to
stdout, everything else to stderr. A model of recipes/diffusion.py restores --max-new-tokens hidden ones, the surest
first, one in a round.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.models import LanguageModel
    from ftlib.tokenizers import Tokenizer


def main(argv: Sequence[str]) -> int:
    """`tune generate MODEL [--adapter DIR] --prompt T …`"""
    args = _parse(argv)
    if len(args.prompt) > 1:
        raise UserError(f"{len(args.prompt)} prompts", where="--prompt", fix="give one a call; tune serve answers many")
    import torch  # here, so that a wrong option answers at once

    from ftlib.cli import loading
    from ftlib.generation import Engine, SamplingParams

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = loading.chosen_dtype(args.dtype, device)
    base, adapter = loading.find(args.model, args.adapter)
    model, tokenizer = loading.load(base, adapter, dtype=dtype, device=device, code=args.code, masked=True)
    prompt = _encode(tokenizer, sys.stdin.read() if args.prompt[0] == "-" else args.prompt[0], args.system, args.raw)
    if mask := loading.mask_token(base, adapter):
        print(_restored(model, tokenizer, prompt, mask, args))
        return 0
    params = SamplingParams(
        args.max_new_tokens, temperature=args.temperature, stop_ids=tokenizer.stop_ids, seed=args.seed
    )
    completion = Engine(model, compile="graphs").generate([prompt], params)[0][0]
    print(tokenizer.decode(completion.token_ids, skip_special=True))
    if completion.finish_reason == "length":
        print(f"(cut off after --max-new-tokens {args.max_new_tokens})", file=sys.stderr)
    return 0


def _restored(
    model: "LanguageModel", tokenizer: "Tokenizer", prompt: list[int], mask: str, args: argparse.Namespace
) -> str:
    """The text behind a prompt up to where it ends, of a model that looks both ways."""
    from ftlib.losses.diffusion import sample

    length, how = args.max_new_tokens, {"temperature": args.temperature, "seed": args.seed}
    (ids,) = sample(model, [prompt], length, tokenizer.special_tokens[mask], steps=length, **how)
    return tokenizer.decode(list(takewhile(lambda i: i not in tokenizer.stop_ids, ids)), skip_special=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("generate", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format for MODEL")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    parser.add_argument("--prompt", required=True, action="append", help="the text; - reads it from stdin")
    parser.add_argument("--system", help="a system message before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws when the temperature is above 0")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text itself")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse(argv)
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise UserError("tune generate: --max-new-tokens is at least 1, --temperature at least 0")
    if args.raw and args.system is not None:
        raise UserError("tune generate: --system needs the chat template that --raw leaves out")
    return args


def _encode(tokenizer: "Tokenizer", text: str, system: str | None, raw: bool) -> list[int]:
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise UserError("this model has no chat template, so --system cannot be placed", fix="put it in --prompt")
        return tokenizer.encode(text, bos=tokenizer.bos_id is not None)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}], add_generation_prompt=True)
