"""Write a config for a file of rows and a model: about ten lines, from the rows' shape and lengths and this machine.

    tune init data.jsonl                                      the model that ships with ftlib, no download
    tune init data.jsonl --model Qwen/Qwen3-0.6B --out my.yaml

Only the model's config and tokenizer are fetched. Where they cannot be, lengths are guessed from the characters.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli import assets
from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

RATES = {"lora_sft": "2e-4", "full_sft": "2e-5", "pretrain": "3e-4", "dpo": "5e-6", "reward": "1e-4"}
KINDS = {"dpo": ("pairs", "rated"), "reward": ("pairs", "steps")}  # what rows of answers hold; else texts to imitate


def main(argv: Sequence[str]) -> int:
    """`tune init DATA [--model M] [--code C] [--recipe R] [--out FILE] [--force]`"""
    parser = Parser("init", __doc__)
    parser.add_argument("data", metavar="DATA", help="a file of rows: JSON lines, JSON or text")
    parser.add_argument("--model", default="ftlib:demo/model", help="a folder, a Hub id or ftlib:demo/model (default)")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of the run")
    parser.add_argument("--recipe", choices=RATES, help="default: as the rows are: lora_sft, dpo or reward")
    parser.add_argument("--out", metavar="FILE", help="default: the data's name with .yaml, in this folder")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse(argv)
    out = Path(os.path.expanduser(args.out or f"{Path(args.data).name.split('.')[0]}.yaml"))
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"tune init: {out} is no .yaml file", fix=f"--out {out.with_suffix('.yaml')}")
    if out.exists() and not args.force:
        raise UserError(f"{out} exists and stays as it is", fix="name another file with --out, or add --force")
    from ftlib.cli import sizing  # imports torch

    model = sizing.look_at(args.model, args.code)
    kinds = KINDS.get(args.recipe, ("train",)) if args.recipe else ("train", *KINDS["dpo"], "steps")
    rows = sizing.measure(args.data, model, kinds)
    recipe = args.recipe or {"train": "lora_sft", "steps": "reward"}.get(rows.kind, "dpo")
    plan = sizing.plan(model, rows, full=recipe in ("full_sft", "pretrain"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_text(args.data, args.model, args.code, recipe, out, rows, plan), encoding="utf-8")
    for line in [*rows.lines, *plan.notes]:
        print(line)
    print(f"wrote {out}; next:")
    print(f"  tune validate recipes/{recipe}.py --config {shlex.quote(str(out))}")
    print(f"  tune run recipes/{recipe}.py --config {shlex.quote(str(out))}")
    return 0


def _text(
    data: str, model: str, code: str | None, recipe: str, out: Path, rows: "sizing.Rows", plan: "sizing.Plan"  # noqa: F821
) -> str:
    own = f", code: {_scalar(_code(out, code))}" if code else ""
    lines = [
        assets.schema_line(recipe),
        f"# {recipe} of {model} on {Path(data).name}: {rows.summary}",
        f"model: {{path: {_scalar(_from(out, model))}{own}}}",
        "data:",
        f"  sources: [{{path: {_scalar(_from(out, data))}}}]",
        f"  seq_len: {plan.seq_len}",
        f"batch: {{rows: {plan.rows}, micro_rows: {plan.micro_rows}}}",
        *{"rated": ["dpo: {loss: kto}"], "steps": ["reward: {kind: steps}"]}.get(rows.kind, []),
        f"epochs: {plan.epochs if rows.kind == 'train' else 1}",
        f"optim: {{lr: {RATES[recipe]}}}",
        f"dtype: {plan.dtype}",
        f"output_dir: {_scalar(f'output/{out.stem}')}",
    ]
    if rows.template:
        lines.insert(6, f"  template: {rows.template}")
    if plan.truncate:
        lines.insert(6, "  overlong: truncate")
    if plan.held_out:
        lines.insert(5, f"  eval: {plan.held_out}")
    return "\n".join(lines) + "\n"


def _from(out: Path, name: str) -> str:
    """A path as a YAML beside `out` has to write it; other names as they are."""
    local = Path(os.path.expanduser(name))
    if name.startswith("ftlib:") or not local.exists():
        return name
    path = os.path.relpath(local.resolve(), out.parent.resolve())
    return path if "/" in path else f"./{path}" if local.is_dir() else path


def _code(out: Path, code: str) -> str:
    """`FILE.py:CLASS` as a YAML beside `out` has to write it."""
    file, colon, name = code.rpartition(":")
    return f"{_from(out, file)}{colon}{name}" if file.endswith(".py") else code


def _scalar(text: str) -> str:
    """A text as it may stand inside {…}."""
    plain = all(c.isalnum() or c in "._-/@~" for c in text) or text.startswith("ftlib:")
    return text if plain and not text.replace(".", "").isdigit() else "'" + text.replace("'", "''") + "'"
