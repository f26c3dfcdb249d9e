"""Write a model with an adapter merged into its weights, as a folder that any library loads. Needs no GPU.

    tune merge MODEL ADAPTER OUT
    tune merge MODEL output/run/checkpoints/step_000100 OUT      any checkpoint of a run on MODEL, LoRA or full

The sum is computed in float32 and stored in the precision that MODEL's files have, or where they are quantized in the
one that its config.json names; --dtype fp32 rounds nothing, so that the result is to the bit what a run with dtype=fp32
trained. An adapter that was trained on a quantized base has learned to make up for what that lost: with --quantize it
is merged into that very base. Without it the result is another model than the one that was trained and evaluated, and
a note says so.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

FORMS = ("nf4", "int8", "fp8")


def main(argv: Sequence[str]) -> int:
    """`tune merge MODEL ADAPTER OUT`"""
    parser = Parser("merge", __doc__)
    parser.add_argument("model", metavar="MODEL", help="the base: a folder, a Hub id or ftlib:demo/model")
    parser.add_argument("adapter", metavar="ADAPTER", help="a LoRA adapter in PEFT format, or a run's checkpoint")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--quantize", choices=FORMS, help="model.quantize of the adapter's run")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: that of MODEL's files")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    args = parser.parse(argv)
    out = Path(os.path.expanduser(args.out))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and stays as it is", fix="name a folder that does not exist yet, or is empty")
    first, second = (Path(os.path.expanduser(name)) for name in (args.model, args.adapter))
    if (first / "adapter_config.json").is_file() and (second / "config.json").is_file():
        raise UserError(f"{first} is an adapter: the model comes first", fix=f"tune merge {second} {first} {args.out}")
    import torch  # takes a second: a wrong argument answers at once

    from ftlib import models, quant
    from ftlib.adapters import merge, peft_format
    from ftlib.checkpoint.final import publish, staging
    from ftlib.cli import checkpoints, loading
    from ftlib.models import hub, mtp, own

    checkpoint, about = Path(os.path.expanduser(args.adapter)), {}
    if checkpoints.is_checkpoint(checkpoint):
        base = hub.resolve(args.model)
        model = models.from_pretrained(base, dtype=loading.merged_dtype(args.dtype, base), decoder=own.find(args.code))
        has_adapter = checkpoints.fill(model, checkpoint)
        now, was = own.mark(args.code), checkpoints.code(checkpoint)
        own.compare(checkpoint, was, now)
        model.code = now or was
        kept = checkpoints.base_form(checkpoint, base, own.find(args.code)) if has_adapter else None
        _check_base(args.quantize, kept, has_adapter, known=True)
        quant.round_through(model, args.quantize)
        count = merge.merge_into(model) if has_adapter else None
        tokenizer, about = checkpoints.tokenizer(checkpoint, base), checkpoints.about(checkpoint)
        said = f"{checkpoint} of {base} -> {out}" + (f", {count} adapted layers merged" if count else "")
    else:
        base, adapter = loading.find(args.model, args.adapter)
        _check_base(args.quantize, kept := peft_format.base_form(adapter), known=checkpoints.is_of_plain_base(adapter))
        dtype = loading.merged_dtype(args.dtype, base)
        model, tokenizer = loading.load(base, adapter, dtype=dtype, device="cpu", code=args.code, rounded=False)
        quant.round_through(model, args.quantize)
        said = f"merged {merge.merge_into(model)} layers of {adapter} into {base} -> {out}"
    folder = staging(out)
    models.save_pretrained(model, folder, about=about)
    tokenizer.save(folder)
    publish(folder, out)
    print(said)
    if (base / mtp.FOLDER).is_dir() or checkpoints.predicts_ahead(checkpoint):
        what = f"{out} is the model alone, as other libraries read it: what predicts further tokens (mtp)"
        print(f"note: {what} is left out", file=sys.stderr)
    if kept and not args.quantize:
        remedy = f"--quantize {kept} merges it into that base" if kept in FORMS else "no --quantize gives that base"
        loading.note_other_base(checkpoint, kept, f"; {remedy}")
    if checkpoints.rounded_in_fp32(checkpoint) and model.lm_head.weight.dtype != torch.float32:
        _note_rounding(checkpoint, model.lm_head.weight.dtype)
    return 0


def _note_rounding(adapter: Path, dtype: object) -> None:
    """Say that what is stored is rounded before the rounding that a run with `qat` has learned to make up for."""
    stored = str(dtype).removeprefix("torch.")
    what = f"{adapter} was trained against rounding (qat) in float32, and the sum is stored in {stored}"
    print(f"note: {what}: rounded from there it is not what was evaluated; --dtype fp32 keeps it", file=sys.stderr)


def _check_base(asked: str | None, kept: str | None, has_adapter: bool = True, *, known: bool) -> None:
    """UserError where --quantize is not what an adapter was trained on. `known`: `kept=None` means the plain base."""
    if asked and not has_adapter:
        raise UserError("the checkpoint holds a whole model, so no base", where="--quantize", fix="leave it out")
    if asked and known and kept is None:
        what = "the adapter was trained on the plain base"
        raise UserError(f"{what}, not on one kept in {asked}", where="--quantize", fix="leave it out")
    if asked and kept and asked != kept:
        what = f"the adapter was trained on a base kept in {kept}, not in {asked}"
        raise UserError(what, where="--quantize", fix=f"--quantize {kept}" if kept in FORMS else "leave it out")
