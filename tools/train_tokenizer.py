"""Trains a byte-level BPE tokenizer and writes it as a folder that ftlib and transformers load, with equal ids.

    python tools/train_tokenizer.py OUT SOURCE … --vocab-size 32000 [--template chatml] [--eos '<|im_end|>']
        [--special '<|mask|>'] [--visible '<tool_call>' '</tool_call>']

A source is whatever `data.sources[].path` takes: files of any kind, folders, patterns, Hub ids. Rows that are text are
read as they are, conversations rendered with the template. Every byte is in the vocabulary, so that no text is lost.
Special tokens take the first ids, those that the template marks turns with among them; nothing is merged across them.
Answers end where the template's marker does, texts at --eos. Equal input gives an equal tokenizer.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ftlib import data
from ftlib.errors import UserError
from ftlib.sections import Source
from ftlib.tokenizers import load_template, render_chat_template

# How text is cut before merging: words with one leading sign or space, single digits, runs of signs, runs of space.
# This is the pattern of Qwen2's tokenizer, so that programs which know patterns by name (llama.cpp) can read ours.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = 256
MARKER = re.compile(r"<\|\w+\|>|<\w+_of_turn>")  # what a template marks turns with


def documents(paths: Iterable[str | Path], template: str | None, **names: str) -> Iterator[str]:
    """Every document of the sources as text, conversations rendered with `template` (`names`: its bos_token, …)."""
    for path in paths:
        for example in data.examples(Source(path=str(path)))[1]:
            if example.text is not None:
                yield example.text
            elif example.segments is not None:
                yield "".join(text for text, _ in example.segments)
            elif example.messages is None or example.record is not None:
                raise UserError("these rows are neither text nor conversations", where=example.where)
            elif template is None:
                raise UserError("these rows are conversations", where=example.where, fix="give --template")
            else:
                yield render_chat_template(template, example.messages, tools=example.tools, **names)


def markers(template: str, **names: str) -> tuple[list[str], list[str]]:
    """What a template marks turns with, and of these the one that ends an answer, if any does."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\0"}]
    text = render_chat_template(template, turns, **names)
    return MARKER.findall(template + text), MARKER.findall(text.rpartition("\0")[2])[:1]


def train(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], visible: Sequence[str] = (), pattern: str = WORDS
) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: the `special` tokens first, those `visible` in decoded text last.

    UserError where that is not possible: too few ids, or too little text for so many.
    """
    least = BYTES + len(special) + len(visible)
    if vocab_size < least:
        raise UserError(f"{vocab_size} ids are too few", where="--vocab-size", fix=f"give at least {least}")
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(visible),
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marked = re.compile("|".join(map(re.escape, (*special, *visible))))
    tokenizer.train_from_iterator((part for text in texts for part in marked.split(text) if part), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in visible])
    if (made := tokenizer.get_vocab_size()) != vocab_size:
        raise UserError(f"the text has too few pairs for {vocab_size} ids", where="--vocab-size", fix=f"give {made}")
    return tokenizer


def save(
    tokenizer: Tokenizer, folder: Path, *, eos: str, pad: str, bos: str | None = None, template: str | None = None,
    stops: Sequence[str] = (), max_length: int = 1024,
) -> None:  # fmt: skip
    """The files of a Hugging Face tokenizer: tokenizer.json, its config, special tokens, template, and when to stop
    (at `eos` and `stops`)."""
    folder.mkdir(parents=True, exist_ok=True)
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    more = [token.content for _, token in added if token.special and token.content not in (eos, pad, bos)]
    names = {"eos_token": eos, "pad_token": pad, "additional_special_tokens": more}
    names |= {"bos_token": bos} if bos else {}
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "added_tokens_decoder": {
            str(i): {"content": token.content} | {flag: getattr(token, flag) for flag in flags} for i, token in added
        },
    } | names
    ends = [tokenizer.token_to_id(name) for name in dict.fromkeys((eos, *stops))]
    generation = {"eos_token_id": ends, "pad_token_id": tokenizer.token_to_id(pad), "do_sample": False}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line; 2 for a mistake in it or in the sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--template", help="chat template, by name or as a .jinja file; saved with the tokenizer")
    parser.add_argument("--eos", default="<|endoftext|>", help="ends texts and answers")
    parser.add_argument("--pad", default="<|pad|>")
    parser.add_argument("--bos", help="begins texts, where the model wants that")
    parser.add_argument("--special", nargs="*", default=[], help="further tokens that decoded text leaves out")
    parser.add_argument("--visible", nargs="*", default=[], help="further tokens that decoded text shows")
    parser.add_argument("--pattern", default=WORDS, help="regular expression of the words that are never merged")
    parser.add_argument("--max-length", type=int, default=1024, help="longest text the model is meant for, in tokens")
    args = parser.parse_args(argv)
    named = {"eos": args.eos, "pad": args.pad, "bos": args.bos}
    try:
        template = load_template(args.template) if args.template else None
        names = {"eos_token": args.eos, "bos_token": args.bos or ""}
        texts = documents(args.sources, template, **names)
        marked, stops = markers(template, **names) if template else ([], [])
        special = dict.fromkeys(token for token in (args.pad, args.bos, args.eos, *args.special, *marked) if token)
        tokenizer = train(texts, args.vocab_size, list(special), args.visible, args.pattern)
        save(tokenizer, args.out, **named, template=template, stops=stops, max_length=args.max_length)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.vocab_size:,} ids in {args.out}; special: {' '.join(special)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
