"""TRL with PEFT and Liger's kernels: its SFTTrainer with the settings its documentation gives for speed."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import common
import hf_peer
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    work = common.job()
    path = hf_peer.checkpoint(work["shape"])
    varlen = "documents" in work and not work["padded"]  # needs the package flash_attn, or its stand-in in shims/
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map="cuda", attn_implementation="flash_attention_2" if varlen else "sdpa"
    )
    lora = None
    if work["method"] == "lora":
        lora = LoraConfig(
            r=work["rank"], lora_alpha=2 * work["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    more = {"gradient_checkpointing": work["recompute"] in common.RECOMPUTED, "use_liger_kernel": True}
    if more["gradient_checkpointing"]:
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = SFTConfig(**hf_peer.settings(work), **more)
    data = hf_peer.dataset(work)
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments, peft_config=lora)
    hf_peer.same_adapters(trainer.model)
    hf_peer.measure("trl", work, trainer, ("trl", "peft", "liger-kernel", "transformers"))


if __name__ == "__main__":
    main()
