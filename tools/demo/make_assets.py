"""Makes what lies under ftlib/assets/demo from nothing: text, tasks, tokenizer, config.json; with --train the weights.

    python tools/demo/make_assets.py [--out ftlib/assets/demo] [--train]

Needs ftlib installed. Equal bytes every time but for the weights, whose last digits depend on the processor. Training
reads 5.5 million tokens, about a quarter of an hour at the 6,000 a second of two free CPU cores; its settings are those
of configs/demo_pretrain.yaml and what `train_model` lays over them.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from make_tasks import write_tasks
from make_text import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from train_tokenizer import documents, save, train  # noqa: E402

# Special tokens take the first ids. The call markers are single tokens but not special: decoded text shows them.
PAD, END_OF_TEXT, START, END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ("<tool_call>", "</tool_call>")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VOCAB, POSITIONS, STEPS = 512, 1024, 2700
SOURCES = "[{path: 'DATA/pretrain_chat.jsonl.gz'}, {path: 'DATA/pretrain_stories.jsonl.gz'}]"


def model_config(ids: dict[str, int]) -> dict:
    """config.json of the model: llama, 2.8 million parameters, every dimension a multiple of 256."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
        "initializer_range": 0.04,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": [ids[END], ids[END_OF_TEXT]],
        "pad_token_id": ids[PAD],
        "torch_dtype": "bfloat16",
    }


def make(out: Path) -> None:
    """All but the weights."""
    data, model = out / "data", out / "model"
    write_text(data)
    write_tasks(data)
    template = TEMPLATE.read_text(encoding="utf-8")
    texts = documents([data / "pretrain_chat.jsonl.gz", data / "pretrain_stories.jsonl.gz"], template)
    tokenizer = train(texts, VOCAB, (PAD, END_OF_TEXT, START, END), MARKERS)
    save(tokenizer, model, eos=END, pad=PAD, template=template, stops=[END_OF_TEXT], max_length=POSITIONS)
    config = model_config({name: tokenizer.token_to_id(name) for name in (PAD, END, END_OF_TEXT)})
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_model(out: Path, work: Path, steps: int) -> None:
    """Pretrains with the recipe in `work` and puts the weights, rounded to bfloat16, beside the tokenizer."""
    import torch

    from ftlib import models

    command = [sys.executable, "-m", "ftlib", "run", "recipes/pretrain.py", "--config", "configs/demo_pretrain.yaml"]
    sources = SOURCES.replace("DATA", str((out / "data").resolve()))
    settings = [f"model.path={(out / 'model').resolve()}", f"data.sources={sources}", f"output_dir={work}"]
    settings += [f"steps={steps}", "schedule.warmup_steps=135", "optim.weight_decay=0.1", "data.eval=200"]
    settings += ["data.deduplicate=false"]  # as the weights that ship were made
    settings += ["eval.exact_match=100", "eval.max_new_tokens=24", "checkpoint.every=300"]
    subprocess.run([*command, *settings], cwd=ROOT, check=True)
    model = models.from_pretrained(work / "final", dtype=torch.bfloat16, device="cpu")
    models.save_pretrained(model, work / "bfloat16")
    weights = out / "model" / "model.safetensors"
    shutil.copyfile(work / "bfloat16" / "model.safetensors", weights)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "ftlib" / "assets" / "demo")
    parser.add_argument("--train", action="store_true", help="train the weights too")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "output" / "demo_model", help="where training keeps its state"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; fewer only to try the command")
    args = parser.parse_args()
    make(args.out)
    if args.train:
        train_model(args.out, args.work.resolve(), args.steps)


if __name__ == "__main__":
    main()
