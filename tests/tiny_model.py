"""A model of 100k random weights with a byte-level tokenizer, and a task that it learns in seconds."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from parity.shrink import reference, shrunk

from ftlib import config, plugins
from ftlib.models.load import base_state

ROOT = Path(__file__).parents[1]
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ("red", "blue", "green", "white", "black", "brown")


def write_model(folder: Path, name: str = "llama-3.2-1b", **changes: object) -> Path:
    """A model folder in Hugging Face layout: weights from transformers, drawn at random."""
    settings = shrunk(name, vocab_size=260, bos_token_id=None, eos_token_id=258, pad_token_id=256, **changes)
    settings["max_position_embeddings"] = 512
    reference(settings).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A token a byte, three special tokens, ChatML with a trained terminator."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(file: Path, count: int, seed: int = 0, shuffle_answers: bool = False) -> Path:
    """Conversations `say red` -> `red`; shuffled answers make it a task with nothing to learn but the words."""
    dice = random.Random(seed)
    words = [dice.choice(WORDS) for _ in range(count)]
    answers = [dice.choice(WORDS) for _ in words] if shuffle_answers else words
    rows = (
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": answer}]}
        for word, answer in zip(words, answers, strict=True)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_config(file: Path, model: Path, rows: Path, held_out: Path | None = None, **sections: object) -> Path:
    """A config of any SFT recipe on the tiny model: float32, 4 rows of 64 tokens a step."""
    values = {
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(rows)}], "seq_len": 64},
        "batch": {"rows": 4, "micro_rows": 4},
        "steps": 20,
        "optim": {"lr": 1e-2},
        "memory": {"recompute": "none"},
        "dtype": "fp32",
        "output_dir": str(file.parent / "out"),
    } | sections
    if held_out:
        values["data"]["eval"] = [{"path": str(held_out)}]
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def train(recipe: str, *argv: object) -> list[dict]:
    """`main(cfg)` of a recipe in this process; the rows of its metrics.jsonl."""
    module = plugins.load_file(ROOT / "recipes" / f"{recipe}.py")
    return module.main(config.load(module.Config, [str(word) for word in argv]))


def environment(*folders: Path) -> dict[str, str]:
    """Of a process of its own, which imports ftlib and what lies in `folders`, and has one thread."""
    paths = filter(None, (str(ROOT), *map(str, folders), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(*argv: object, cwd: Path | None = None, **options: object) -> subprocess.Popen:
    """The real command in a process of its own: `tune …`."""
    env = environment() | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "ftlib", *map(str, argv)],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def tune(*argv: object, **options: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `tune …`."""
    process = command(*argv, **options)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def undo(out: Path, step: int) -> None:
    """Leave of a finished run what a kill after `step` would have: the same command goes on from a checkpoint."""
    shutil.rmtree(out / "final")
    for folder in (out / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def losses(rows: list[dict]) -> list[str]:
    """The exact training losses, step by step."""
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def steps(rows: list[dict]) -> list[float]:
    """Training losses."""
    return [row["loss"] for row in rows if "loss" in row]


@torch.no_grad()
def probe(logits: object) -> torch.Tensor:
    """Logits that a model (`input_ids -> logits`) gives for fixed tokens."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
    return logits(ids)


def fill_bases(model, weights):
    """Give matrices that are kept in few bits the values that `weights`, a plain model's `base_state`, has for them."""
    for name, base in base_state(model).items():
        if not isinstance(base, torch.Tensor):
            base.fill(weights[name].detach())
