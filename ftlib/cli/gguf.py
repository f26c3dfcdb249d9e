"""Write a model as one GGUF file, which llama.cpp and Ollama load. Needs no GPU and holds one tensor at a time.

    tune gguf MODEL OUT.gguf [--dtype f16|bf16|f32|q8_0]

Families: llama, mistral, qwen2, qwen3; for others llama.cpp's convert_hf_to_gguf.py reads the same folder. K-quants are
made from the f16 file by llama.cpp: `llama-quantize OUT.gguf SMALL.gguf Q4_K_M`. An adapter is merged first:
`tune merge MODEL ADAPTER OUT`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune gguf MODEL OUT.gguf [--dtype D] [--pre NAME] [--force]`"""
    parser = Parser("gguf", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id or ftlib:demo/model")
    parser.add_argument("out", metavar="OUT.gguf")
    parser.add_argument("--dtype", choices=("f16", "bf16", "f32", "q8_0"), default="f16", help="default: f16")
    parser.add_argument("--pre", metavar="NAME", help="llama.cpp's name of the tokenizer's split pattern, if unknown")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse(argv)
    out = Path(os.path.expanduser(args.out))
    if out.suffix != ".gguf":
        raise UserError(f"tune gguf: {out} is no .gguf file", fix=f"name it {out}.gguf")
    if out.exists() and not args.force:
        raise UserError(f"{out} exists and stays as it is", fix="name another file, or add --force")
    from ftlib.cli import loading  # imports torch
    from ftlib.export import gguf
    from ftlib.models import hub, own
    from ftlib.models.remote import size

    folder = hub.resolve(args.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is an adapter", fix=f"merge it first: tune merge MODEL {folder} OUT")
    loading.check_predicts(folder)
    if code := own.recorded(folder):
        print(f"note: {folder} was trained with {code.code}, which no GGUF can hold", file=sys.stderr)
    print(f"{size(gguf.export(folder, out, args.dtype, args.pre))} -> {out}")
    print(f"next: echo 'FROM {out.resolve()}' > Modelfile && ollama create {out.stem} -f Modelfile")
    return 0
