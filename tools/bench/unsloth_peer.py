"""Unsloth: its patched model under its own SFTTrainer; `recompute: full` is its offloading checkpoint."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")

import unsloth  # noqa: F401, I001 - must come before transformers
import common
import hf_peer
import torch
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    work = common.job()
    path = str(hf_peer.checkpoint(work["shape"]))
    full = work["method"] == "full"
    assert work.get("quantize") in (None, "nf4"), "what Unsloth calls 4bit is NF4"
    model, tokenizer = FastLanguageModel.from_pretrained(
        path, max_seq_length=work["seq_len"], dtype=torch.bfloat16, load_in_4bit=bool(work.get("quantize")),
        full_finetuning=full,
    )  # fmt: skip
    recompute = "unsloth" if work["recompute"] in common.RECOMPUTED else False
    if not full:
        model = FastLanguageModel.get_peft_model(
            model, r=work["rank"], lora_alpha=2 * work["rank"], lora_dropout=0, bias="none", target_modules=TARGETS,
            use_gradient_checkpointing=recompute,
        )  # fmt: skip
        hf_peer.same_adapters(model)
    arguments = SFTConfig(**hf_peer.settings(work), gradient_checkpointing=bool(recompute))
    data = hf_peer.dataset(work)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments)
    hf_peer.measure("unsloth", work, trainer, ("unsloth", "unsloth_zoo", "trl", "peft", "transformers"))


if __name__ == "__main__":
    main()
