"""Score a model, or an adapter, on rows it was not trained on: loss, perplexity, answers that equal their reference.

    tune eval MODEL --data held_out.jsonl [--exact-match 50] [--out scores.json]

Nothing is trained, and the numbers are those of a run's evaluation: the mean loss of the target tokens, and the share
of greedy answers that are the reference word for word. --data takes whatever `data.sources[].path` of a config does,
several times for several sets.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.cli.arguments import Parser, result_file
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.data import Documents
    from ftlib.evaluation.exact_match import Answer
    from ftlib.models import LanguageModel
    from ftlib.sections import Source
    from ftlib.tokenizers import Tokenizer

SHOWN = 3  # answers that are printed


def main(argv: Sequence[str]) -> int:
    """`tune eval MODEL --data F [--exact-match N] …`"""
    args = _parse(argv)
    from ftlib.cli import loading  # torch comes here, so that a wrong option answers at once
    from ftlib.layers.attention import choose_backend
    from ftlib.observe.said import said
    from ftlib.sections import Source
    from ftlib.tokenizers import load_template

    model, tokenizer, *_ = loading.named(args)
    if args.template:
        tokenizer.chat_template = load_template(args.template)
    tokenizer.set_template_args(args.template_arg, "--template-arg")
    arch, weight = model.arch, model.lm_head.weight
    backend = choose_backend("auto", weight.device, weight.dtype, arch.softcap, arch.sinks, arch.head_dims)
    model.model.use_attention(backend)
    sources = [Source(path=path, format=args.format, split=args.split) for path in args.data]
    sets = _documents(sources, tokenizer, args.seq_len)
    asked = _conversations(sources, args.exact_match) if args.exact_match else []
    found = _losses(model, sets, tokenizer, args)
    answers = _answers(model, tokenizer, asked, args.max_new_tokens)
    if answers:
        found["exact_match"] = sum(answer.right for answer in answers) / len(answers)
        print(f"exact match: {found['exact_match']:.1%} of {len(answers)} answers")
    for answer in answers[:SHOWN]:
        print(said(answer.prompt, answer.given, args.data[0], answer.expected))
    if args.out:
        _write(args.out, {"model": args.model, "adapter": args.adapter, **found}, answers)
    return 0


def _documents(sources: "Sequence[Source]", tokenizer: "Tokenizer", seq_len: int) -> "dict[str, Documents]":
    """The rows of each source, tokenised and masked as those of a run, by name; says what was found."""
    from ftlib import data
    from ftlib.sections import Data

    sets: dict[str, Documents] = {}
    for source in sources:
        loaded = data.load(Data(sources=(source,), seq_len=seq_len), tokenizer, seed=0, key="--data")
        (report,) = loaded.report.sources
        if report.name in sets:
            raise UserError(f"two sets are called {report.name!r}", where="--data", fix="rename one of the files")
        sets[report.name] = loaded.train
        print("\n".join(report.lines()))
    return sets


def _conversations(sources: "Sequence[Source]", most: int) -> list[list[dict[str, Any]]]:
    """The first `most` that end with an answer to something."""
    from ftlib import data
    from ftlib.evaluation import exact_match

    rows = (example.messages for source in sources for example in data.examples(source, "--data")[1])
    found = [messages for messages in rows if exact_match.answered(messages)]
    if not found:
        what = "no row is a conversation that ends with an answer, so there is none to compare"
        raise UserError(what, where="--exact-match, --data", fix="leave --exact-match out: any rows have a loss")
    return found[:most]


def _losses(
    model: "LanguageModel", sets: "dict[str, Documents]", tokenizer: "Tokenizer", args: argparse.Namespace
) -> dict[str, Any]:
    """`eval_loss` over all targets of all sets and its `perplexity`; of several sets each one's `eval_loss_NAME`."""
    from ftlib import data
    from ftlib.evaluation import held_out

    run, losses, weights = held_out.Alone(model.lm_head.weight.device), {}, {}
    for name, rows in sets.items():
        batches = data.eval_batches(rows, args.seq_len, args.micro_rows, tokenizer.pad_id or 0)
        losses[name], weights[name] = held_out.loss(model, batches, run), rows.target_weights.sum().item()
    mean = sum(losses[name] * weights[name] for name in sets) / sum(weights.values())
    several = losses if len(losses) > 1 else {}
    for name, loss in [*several.items(), ("all", mean)] if several else [("", mean)]:
        print(f"{f'{name}: ' if name else ''}loss {loss:.4f}, perplexity {_exp(loss):,.4f}")
    return {"eval_loss": mean, "perplexity": _exp(mean)} | {f"eval_loss_{name}": loss for name, loss in several.items()}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _answers(
    model: "LanguageModel", tokenizer: "Tokenizer", asked: list[list[dict[str, Any]]], most: int
) -> "list[Answer]":
    from ftlib.evaluation import exact_match
    from ftlib.generation import Engine

    return exact_match.answer(Engine(model, max_batch=64, compile="off"), tokenizer, asked, most) if asked else []


def _write(out: Path, scores: dict[str, Any], answers: "list[Answer]") -> None:
    rows = [{"prompt": a.prompt, "reference": a.expected, "answer": a.given, "right": a.right} for a in answers]
    scores = {key: None if value in (math.inf, -math.inf) or value != value else value for key, value in scores.items()}
    text = json.dumps(scores | ({"answers": rows} if rows else {}), indent=2, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {out}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("eval", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id, ftlib:demo/model, or an adapter's folder")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format for MODEL")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    parser.add_argument("--data", required=True, action="append", metavar="F", help="held-out rows; may be repeated")
    parser.add_argument("--format", default="auto", help="the shape of the rows, where detection is wrong")
    parser.add_argument("--split", help="a part of them: test, [:200], test[1000:]")
    parser.add_argument("--template", help="another chat template: a built-in name or a .jinja file")
    parser.add_template_arg()
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="of a row, longer ones are dropped")
    parser.add_argument("--micro-rows", type=int, default=1, metavar="N", help="rows of one forward (default: 1)")
    parser.add_argument("--exact-match", type=int, default=0, metavar="N", help="so many greedy answers are compared")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of such an answer (default: 64)")
    parser.add_argument("--out", metavar="F.json", help="write the scores, and the answers, as JSON")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse(argv)
    if min(args.micro_rows, args.max_new_tokens) < 1 or args.seq_len < 2 or args.exact_match < 0:
        what = "--micro-rows and --max-new-tokens are at least 1, --seq-len at least 2, --exact-match at least 0"
        raise UserError(f"tune eval: {what}")
    args.out = result_file(args.out)
    return args
