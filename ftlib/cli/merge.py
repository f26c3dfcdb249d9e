"""Write a model with a LoRA adapter merged into its weights, as a folder that any library loads.

    tune merge MODEL ADAPTER OUT

The sum is computed in float32 and stored in the precision of MODEL.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune merge MODEL ADAPTER OUT`"""
    parser = Parser("merge", __doc__)
    parser.add_argument("model", metavar="MODEL", help="the base: a folder, a Hub id or ftlib:demo/model")
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder of a LoRA adapter in PEFT format")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet, or is empty")
    args = parser.parse(argv)
    out = Path(os.path.expanduser(args.out))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and stays as it is", fix="name a folder that does not exist yet, or is empty")
    from ftlib import models  # imports torch: a wrong argument answers at once
    from ftlib.adapters import merge
    from ftlib.cli import loading

    base, adapter = loading.find(args.model, args.adapter)
    model, tokenizer = loading.load(base, adapter, dtype=loading.stored_dtype(base), device="cpu")
    count = merge.merge_into(model)
    models.save_pretrained(model, out)
    tokenizer.save(out)
    print(f"merged {count} layers of {adapter} into {base} -> {out}")
    return 0
