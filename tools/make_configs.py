"""Write configs/<model>_<recipe>.yaml for the models people run, each with what it needs computed from its shapes.

    python tools/make_configs.py          # writes them
    python tools/make_configs.py --check  # says which differ from what it would write

The shapes are the published config.json files kept in tests/parity/configs; nothing is downloaded.
"""

import importlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib import config, preflight  # noqa: E402
from ftlib.adapters import lora  # noqa: E402
from ftlib.layers.attention import choose_backend  # noqa: E402
from ftlib.models import load  # noqa: E402

SHAPES = ROOT / "tests" / "parity" / "configs"
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"
NO_SYSTEM = "yahma/alpaca-cleaned"  # for chat templates that refuse a system message


@dataclass(frozen=True)
class Plan:
    """One config: `shape` is a file of SHAPES, `gpus` of 80 GB each share the model."""

    title: str
    shape: str
    path: str
    recipe: str = "lora_sft"
    gpus: int = 1
    micro_rows: int = 2
    targets: str = "all-linear"
    seq_len: int = 4096
    data: str = "HuggingFaceH4/no_robots"

    @property
    def file(self) -> Path:
        return ROOT / "configs" / f"{self.shape}_{self.recipe}.yaml"


PLANS = (
    Plan("Qwen3 0.6B", "qwen3-0.6b", "Qwen/Qwen3-0.6B", micro_rows=4),
    Plan("Qwen3 0.6B", "qwen3-0.6b", "Qwen/Qwen3-0.6B", recipe="full_sft", micro_rows=4),
    Plan("Qwen3 1.7B", "qwen3-1.7b", "Qwen/Qwen3-1.7B", micro_rows=4),
    Plan("Qwen3 4B", "qwen3-4b", "Qwen/Qwen3-4B"),
    Plan("Qwen3 8B", "qwen3-8b", "Qwen/Qwen3-8B"),
    Plan("Qwen3 8B", "qwen3-8b", "Qwen/Qwen3-8B", recipe="full_sft", gpus=4),
    Plan("Qwen3 14B", "qwen3-14b", "Qwen/Qwen3-14B"),
    Plan("Qwen3 32B", "qwen3-32b", "Qwen/Qwen3-32B", gpus=2),
    Plan("Qwen3 30B-A3B", "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", gpus=2, targets=ATTENTION),
    Plan("Qwen2.5 0.5B", "qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", micro_rows=4),
    Plan("Qwen2.5 7B", "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
    Plan("Llama 3.2 1B", "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", micro_rows=4),
    Plan("Llama 3.2 3B", "llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct"),
    Plan("Llama 3.1 8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
    Plan("Llama 3.1 8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", recipe="full_sft", gpus=4),
    Plan("Llama 3.3 70B", "llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", gpus=4, micro_rows=1),
    Plan("Gemma 2 2B", "gemma-2-2b", "google/gemma-2-2b-it", data=NO_SYSTEM),
    Plan("Gemma 3 1B", "gemma-3-1b", "google/gemma-3-1b-it", micro_rows=4),
    Plan("Gemma 3 4B, text", "gemma-3-4b", "google/gemma-3-4b-it"),
    Plan("Gemma 3 12B, text", "gemma-3-12b", "google/gemma-3-12b-it"),
    Plan("Gemma 3 27B, text", "gemma-3-27b", "google/gemma-3-27b-it", gpus=2),
    Plan("Mistral NeMo 12B", "mistral-nemo-12b", "mistralai/Mistral-Nemo-Instruct-2407"),
    Plan("Mistral Small 24B", "mistral-small-24b", "mistralai/Mistral-Small-24B-Instruct-2501", micro_rows=1),
    Plan("Ministral 3 3B, text", "ministral-3-3b", "mistralai/Ministral-3-3B-Instruct-2512"),
    Plan("Ministral 3 8B, text", "ministral-3-8b", "mistralai/Ministral-3-8B-Instruct-2512"),
    Plan("Mixtral 8x7B", "mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", gpus=2, targets=ATTENTION,
         data=NO_SYSTEM),
    Plan("Phi-4 14B", "phi-4", "microsoft/phi-4"),
    Plan("Phi-4-mini 4B", "phi-4-mini", "microsoft/Phi-4-mini-instruct"),
    Plan("OLMo 2 7B", "olmo-2-7b", "allenai/OLMo-2-1124-7B-Instruct"),
    Plan("OLMo 3 7B", "olmo-3-7b", "allenai/Olmo-3-7B-Instruct"),
    Plan("OLMo 3 32B", "olmo-3-32b", "allenai/Olmo-3.1-32B-Instruct", gpus=2),
    Plan("gpt-oss 20B", "gpt-oss-20b", "openai/gpt-oss-20b", targets=ATTENTION),
    Plan("Granite 3.3 8B", "granite-3.3-8b", "ibm-granite/granite-3.3-8b-instruct"),
    Plan("SmolLM3 3B", "smollm3-3b", "HuggingFaceTB/SmolLM3-3B"),
    Plan("GLM-4 9B", "glm-4-9b", "zai-org/GLM-4-9B-0414"),
    Plan("GLM-4 32B", "glm-4-32b", "zai-org/GLM-4-32B-0414", gpus=2),
    Plan("Qwen1.5-MoE A2.7B", "qwen1.5-moe-a2.7b", "Qwen/Qwen1.5-MoE-A2.7B-Chat", targets=ATTENTION),
    Plan("OLMoE 1B-7B", "olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924-Instruct", targets=ATTENTION),
    Plan("GLM-4.5-Air 106B-A12B", "glm-4.5-air", "zai-org/GLM-4.5-Air", gpus=4, micro_rows=1, targets=ATTENTION),
    Plan("Seed-OSS 36B", "seed-oss-36b", "ByteDance-Seed/Seed-OSS-36B-Instruct", gpus=2),
    Plan("ERNIE 4.5 0.3B", "ernie-4.5-0.3b", "baidu/ERNIE-4.5-0.3B-PT", micro_rows=4),
    Plan("Hunyuan 1.8B", "hunyuan-1.8b", "tencent/Hunyuan-1.8B-Instruct", micro_rows=4),
    Plan("EXAONE 4.0 1.2B", "exaone-4.0-1.2b", "LGAI-EXAONE/EXAONE-4.0-1.2B", micro_rows=4),
    Plan("EXAONE 4.0 32B", "exaone-4.0-32b", "LGAI-EXAONE/EXAONE-4.0-32B", gpus=2),
    Plan("AFM 4.5B", "afm-4.5b", "arcee-ai/AFM-4.5B"),
)


def body(plan: Plan) -> str:
    """The YAML below the header."""
    adapters = plan.recipe == "lora_sft"
    lines = [
        f"model: {{path: {plan.path}}}",
        "data:",
        f"  sources: [{{path: {plan.data}, split: train}}]  # your own: rows.jsonl with messages",
        "  eval: 0.02",
        f"  seq_len: {plan.seq_len}",
        f"batch: {{rows: 16, micro_rows: {plan.micro_rows}}}",
        "epochs: 1",
        *([f"lora: {{rank: 16, alpha: 32, targets: {plan.targets}}}"] if adapters else []),
        f"optim: {{lr: {'2e-4' if adapters else '1e-5'}}}",
        "schedule: {warmup_steps: 10}",
        "memory: {recompute: full}",
        f"output_dir: output/{plan.file.stem}",
    ]
    return "\n".join(lines) + "\n"


def need(plan: Plan) -> preflight.Need:
    """What each GPU needs (ftlib.preflight)."""
    sys.path.insert(0, str(ROOT / "recipes"))
    recipe = importlib.import_module(plan.recipe)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((SHAPES / f"{plan.shape}.json").read_text())
        file = Path(folder) / "plan.yaml"
        file.write_text(body(plan))
        cfg = config.load(recipe.Config, ["--config", str(file)])
        model = load.build(Path(folder), torch.bfloat16)
    arch = model.arch
    model.model.use_attention(choose_backend("auto", torch.device("cuda"), torch.bfloat16, arch.softcap, arch.sinks))
    if hasattr(cfg, "lora"):
        lora.attach_section(model, cfg.lora)
    return preflight.need(model, cfg, plan.gpus)


def text(plan: Plan) -> str:
    """The whole file."""
    method = "LoRA" if plan.recipe == "lora_sft" else "every weight"
    many = f" each, on {plan.gpus} GPUs" if plan.gpus > 1 else ", on one GPU"
    nproc = f" --nproc-per-node {plan.gpus}" if plan.gpus > 1 else ""
    packed = " (published quantized: read as bf16)" if "quantization_config" in _shape(plan) else ""
    made = need(plan)
    listed = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in made.moments[made.peak].items() if value)
    return (
        f"# {plan.title}, {method}{packed}: about {made.about / 2**30:.1f} GiB{many} ({listed})\n"
        f"# yaml-language-server: $schema=schema/{plan.recipe}.json\n"
        f"# tune run{nproc} recipes/{plan.recipe}.py --config configs/{plan.file.name}\n{body(plan)}"
    )


def _shape(plan: Plan) -> dict:
    return json.loads((SHAPES / f"{plan.shape}.json").read_text())


def main(argv: list[str]) -> int:
    wrong = []
    for plan in PLANS:
        made = text(plan)
        if "--check" in argv:
            if not plan.file.exists() or plan.file.read_text() != made:
                wrong.append(plan.file.name)
        else:
            plan.file.write_text(made)
    print("\n".join(f"{name} differs: run python tools/make_configs.py" for name in wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
