"""TRL's GRPOTrainer with PEFT, completions from transformers' generate (no vLLM), Liger's kernels on a GPU."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import tempfile
from importlib.metadata import version

import common
import hf_peer
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """Notes how long each set of completions took, and how long they were."""

    seconds, lengths = 0.0, (0, 0)

    def _generate(self, prompts: list) -> tuple:
        start = common.wait()
        found = super()._generate(prompts)
        self.seconds += common.wait() - start
        self.lengths = sum(map(len, found[1])), len(found[1])
        return found


class Clock(TrainerCallback):
    """A row for each optimizer step of `trainer`."""

    def __init__(self, trainer: Timed) -> None:
        self.trainer, self.rows = trainer, []

    def on_step_begin(self, *_: object, **__: object) -> None:
        common.forget_peak()
        self.trainer.seconds, self.start = 0.0, common.wait()

    def on_step_end(self, *_: object, **__: object) -> None:
        total, drawing = common.wait() - self.start, self.trainer.seconds
        tokens, count = self.trainer.lengths
        self.rows.append({
            "seconds/generate": round(drawing, 3), "seconds/train": round(total - drawing, 3),
            "drawn_tokens_per_s": round(tokens / drawing), "samples_per_s": round(count / total, 2),
            "length": tokens / count, "step_s": round(total, 3), "peak_gib": common.peak_gib(),
        })  # fmt: skip


def main() -> None:
    work = common.job()
    path = hf_peer.checkpoint(work["shape"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(common.DEVICE)
    adapters = {"r": work["rank"], "lora_alpha": 2 * work["rank"], "target_modules": "all-linear"}
    lora = LoraConfig(**adapters, task_type="CAUSAL_LM") if work["rank"] else None
    samples = work["prompts"] * work["group"]
    at_once = max(1, work["micro_rows"] * work["seq_len"] // (work["prompt_tokens"] + work["new_tokens"]))
    while samples % at_once:  # a micro-batch holds at most the tokens that ours does
        at_once -= 1
    on_gpu = common.DEVICE.type == "cuda"
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=at_once,
        gradient_accumulation_steps=samples // at_once, num_generations=work["group"],
        max_completion_length=work["new_tokens"], max_steps=work["steps"], learning_rate=1e-5, temperature=1.0,
        optim="adamw_torch_fused", bf16=True, use_cpu=not on_gpu, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=work["recompute"] != "none", use_liger_kernel=on_gpu,
    )  # fmt: skip
    trainer = Timed(
        model=model,
        reward_funcs=lambda completions, **_: [float(number % 2) for number in range(len(completions))],
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(path),
        train_dataset=prompts(work),
        peft_config=lora,
    )
    clock = Clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    packages = ("trl", "peft", "transformers", *(["liger-kernel"] if on_gpu else []))
    common.report_steps("trl", work, clock.rows, {package: version(package) for package in packages})


def prompts(work: dict) -> Dataset:
    """Words that the checkpoint's tokenizer makes as many tokens of."""
    size, generator = common.config_of(work["shape"])["vocab_size"], torch.Generator().manual_seed(0)
    shape = (work["prompts"] * work["steps"], work["prompt_tokens"])
    rows = torch.randint(0, size - 3, shape, generator=generator).tolist()
    return Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in rows])


if __name__ == "__main__":
    main()
