"""Look a data set over before it costs GPU hours: its shape, lengths, masks, repeats, and every broken row.

    tune doctor DATA [--model M] [--template T] [--eval DATA] [--seq-len N] [--out DIR]

DATA is whatever `data.sources[].path` of a config may be; preferences, prompts and references are told as such.
--model names the tokenizer and template that decide on lengths and masks (default: the model that ships with ftlib).
--out gets rows.csv, a line a row, and report.html.
"""

from collections.abc import Sequence
from pathlib import Path

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError


def main(argv: Sequence[str]) -> int:
    """`tune doctor DATA [--model M] [--out DIR]`"""
    parser = Parser("doctor", __doc__)
    parser.add_argument("data", metavar="DATA", help="file, folder, pattern, address or Hub id")
    parser.add_argument("--model", default="ftlib:demo/model", help="its tokenizer and chat template are used")
    parser.add_argument("--template", help="another chat template: a built-in name or a .jinja file")
    parser.add_argument("--eval", help="held-out data, compared with DATA")
    parser.add_argument("--format", default="auto", help="the shape of the rows, where detection is wrong")
    parser.add_argument("--seq-len", type=int, default=2048, help="rows longer than this are counted")
    parser.add_argument("--out", type=Path, help="folder for rows.csv and report.html")
    args = parser.parse(argv)
    if args.seq_len < 2:
        raise UserError(f"tune doctor: --seq-len must be at least 2, got {args.seq_len}")
    from ftlib import tokenizers  # imports what a wrong argument does not need
    from ftlib.data import doctor, doctor_page
    from ftlib.models import hub

    tokenizer = tokenizers.from_pretrained(hub.resolve(args.model))
    if args.template or tokenizer.chat_template is None:
        tokenizer.chat_template = tokenizers.load_template(args.template or "chatml")
    found = doctor.examine(args.data, tokenizer, seq_len=args.seq_len, format=args.format, held_out=args.eval)
    print("\n".join(found.lines()))
    if args.out:
        print(f"wrote {doctor_page.write(found, args.out)}")
    return 0
