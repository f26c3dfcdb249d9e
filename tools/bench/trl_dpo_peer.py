"""TRL's DPOTrainer with PEFT, and Liger's kernels on a GPU: the reference is the model without its adapter."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import common
import hf_peer
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    work = common.job()
    path = hf_peer.checkpoint(work["shape"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(common.DEVICE)
    lora = LoraConfig(r=work["rank"], lora_alpha=2 * work["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    settings = hf_peer.settings(work) | {"per_device_train_batch_size": work["pairs"], "max_length": work["seq_len"]}
    settings |= {"use_cpu": common.DEVICE.type == "cpu"}
    settings.pop("packing")
    more = {"gradient_checkpointing": work["recompute"] != "none", "use_liger_kernel": common.DEVICE.type == "cuda"}
    if more["gradient_checkpointing"]:
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = DPOConfig(**settings, **more, beta=0.1, loss_type="sigmoid")
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(path),
        train_dataset=Dataset.from_list([texts(pair) for pair in common.pairs(work)]),
        peft_config=lora,
    )
    hf_peer.same_adapters(trainer.model)
    packages = ("trl", "peft", "transformers", *(["liger-kernel"] if more["use_liger_kernel"] else []))
    hf_peer.measure("trl", work, trainer, packages)


def texts(pair: tuple[list[int], list[int], list[int]]) -> dict[str, str]:
    """What the word-level tokenizer turns into the pair's ids; the trainer adds the end of each answer."""
    prompt, chosen, rejected = (" ".join(f"w{i}" for i in ids) for ids in (pair[0], pair[1][:-1], pair[2][:-1]))
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


if __name__ == "__main__":
    main()
