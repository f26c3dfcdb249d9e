"""Trains a byte-level BPE tokenizer and writes it as a folder that ftlib and transformers load.

    python tools/demo/train_tokenizer.py OUT_FOLDER TEXT.jsonl[.gz] … --vocab-size 512 --template chat.jinja

Rows are JSON lines with `text`, or with `messages` (and `tools`), which are rendered with the template first; files of
any other name are plain text, one document a line. Digits stay single tokens. Equal input gives an equal tokenizer.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ftlib.tokenizers import render_chat_template

# Special tokens take the first ids. The call markers are single tokens but not special: decoded text shows them.
PAD, END_OF_TEXT, START, END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, END_OF_TEXT, START, END)
MARKERS = ("<tool_call>", "</tool_call>")
# How text is cut before merging: words with one leading sign or space, single digits, runs of signs, runs of space.
# This is the pattern of Qwen2's tokenizer, so that programs which know patterns by name (llama.cpp) can read ours.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(paths: Iterable[Path], template: str | None) -> Iterator[str]:
    """Every document of the files as text, conversations rendered with `template`."""
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if ".jsonl" not in path.name:
                    yield line
                    continue
                row = json.loads(line)
                if "text" in row:
                    yield row["text"]
                elif template is None:
                    raise SystemExit(f"{path} holds conversations: give their template with --template")
                else:
                    yield render_chat_template(template, row["messages"], tools=row.get("tools"))


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with every byte in the vocabulary and exactly `vocab_size` ids, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marked = re.compile("|".join(map(re.escape, SPECIAL + MARKERS)))
    tokenizer.train_from_iterator((part for text in texts for part in marked.split(text) if part), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the text has too few pairs for {vocab_size} tokens: {tokenizer.get_vocab_size()} made")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, template: str | None, max_length: int) -> None:
    """The files of a Hugging Face tokenizer: tokenizer.json, its config, special tokens, template, and when to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [START, END_OF_TEXT]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
    } | names
    stops = [tokenizer.token_to_id(name) for name in (END, END_OF_TEXT)]
    generation = {"eos_token_id": stops, "pad_token_id": tokenizer.token_to_id(PAD), "do_sample": False}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--template", type=Path, help="Jinja chat template, saved with the tokenizer")
    parser.add_argument("--max-length", type=int, default=1024, help="longest text the model is meant for, in tokens")
    args = parser.parse_args()
    template = args.template.read_text(encoding="utf-8") if args.template else None
    save(train(documents(args.files, template), args.vocab_size), args.out, template, args.max_length)


if __name__ == "__main__":
    main()
