"""What peers under the Trainer of transformers share: weights on disk, rows in order, a clock, a row of results."""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import documents
import torch


def checkpoint(shape: str) -> Path:
    """A Hugging Face folder with `common.weight` for every tensor and a word-level tokenizer; written once."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = Path(tempfile.gettempdir()) / "bench_models" / shape
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = common.config_of(shape)
    size = config["vocab_size"]
    config |= {"bos_token_id": None, "eos_token_id": size - 2, "pad_token_id": size - 3, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = {name: common.weight(name, p.shape).cpu() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{i}": i for i in range(size - 3)} | {"<pad>": size - 3, "<eos>": size - 2, "<unk>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def dataset(work: dict):  # noqa: ANN201 - datasets.Dataset
    """The rows of all steps, in order."""
    if "documents" in work:
        return documents.dataset(work)
    from datasets import Dataset

    steps = range(common.WARM + common.TIMED + 1)
    ids = torch.cat([common.tokens(work, i) for i in steps]).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def settings(work: dict) -> dict:
    """SFTConfig's arguments that mean the same work for everyone."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_length": work["seq_len"], "packing": False,
        "per_device_train_batch_size": work["rows"], "gradient_accumulation_steps": 1,
        "max_steps": common.WARM + common.TIMED + 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1e9, "optim": "adamw_torch_fused", "bf16": True, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "dataloader_num_workers": 2,
    } | (documents.settings(work) if "documents" in work else {})  # fmt: skip


def same_adapters(model: torch.nn.Module) -> None:
    """Every lora_A drawn as the other contenders draw it; every lora_B zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                module = name.split(".lora_A.")[0].removeprefix("base_model.model.")
                parameter.copy_(common.weight(f"{module}.lora_A", parameter.shape))
            elif ".lora_B." in name:
                parameter.zero_()


def measure(name: str, work: dict, trainer, packages: tuple[str, ...]) -> None:  # noqa: ANN001 - SFTTrainer
    """Train with a clock around each step, the wait for data left out; print the row."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            if len(seconds) == common.WARM:
                common.forget_peak()
            self.start = common.wait()

        def on_step_end(self, *_, **__) -> None:
            seconds.append(common.wait() - self.start)

    if "documents" in work:
        assert trainer.data_collator.padding_free is not work["padded"], "the trainer chose another kind of batch"
    trainer.add_callback(Clock())
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    checks = [(row["loss"], float(row["grad_norm"])) for row in rows]
    report = documents.report if "documents" in work else common.report
    report(name, work, seconds, checks, {package: version(package) for package in packages})
