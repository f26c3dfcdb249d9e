"""Our contender: the model and the step of recipes/lora_sft.py or full_sft.py on identical weights and tokens."""

import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import torch

import ftlib
from ftlib import budget, build, optim
from ftlib.adapters import lora
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import LanguageModel
from ftlib.models.load import base_state
from ftlib.observe.profile import memory as memory_by_component
from ftlib.parallel import graphs
from ftlib.parallel import run as processes
from ftlib.parallel.run import Run
from ftlib.quant import FORMATS, qat
from ftlib.quant.schemes import SCHEMES
from ftlib.sections import Lora, Loss, Memory, Model, Optim, Parallel, Qat, Train


def main() -> None:
    work = common.job()
    model, _, cfg = build_model(work)
    qat.at(1, model)
    optimizer = optim.build(model, cfg.optim)
    rows, length = work["rows"], work["seq_len"]
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=common.DEVICE)
    positions = torch.arange(length, device=common.DEVICE).expand(rows, length)

    def step(ids: torch.Tensor) -> tuple[float, float]:
        optim.set_rate(optimizer, cfg.optim.lr)
        layout = Layout.packed(cu_seqlens, length, (rows, length))
        batch = Batch(ids, common.shifted(ids), positions, layout, target_tokens=rows * (length - 1))
        loss = next_token_loss(
            model(batch), model.lm_head.weight, batch.labels, batch.target_tokens, **model.logit_terms
        )
        loss = loss / batch.target_tokens
        loss.backward()
        norm = optim.step(optimizer, None)
        return loss.item(), norm.item()

    def held() -> dict:
        return {"memory_gib": memory_by_component(model, optimizer, common.peak() or None)}

    common.measure("ftlib", work | {"note": budget.note(model)}, step, {"ftlib": ftlib.__version__}, held)


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """The plain matrix that a quantized one stands for, or one that `qat` rounds."""
    if form not in FORMATS:
        return SCHEMES[form].weight(weight, Qat().inputs_a_scale)
    return FORMATS[form].dequantize(*FORMATS[form].quantize(weight).values(), weight.dtype)


def build_model(work: dict) -> tuple[LanguageModel, Run, SimpleNamespace]:
    """The model with everybody's weights, the run it belongs to, and the config that made it."""
    folder = Path(tempfile.mkdtemp())
    config = common.config_of(work["shape"])
    (folder / "config.json").write_text(json.dumps(config))
    fp8 = {"fp8": work.get("fp8"), "fp8_smallest": min(1024, config["hidden_size"])}
    lora_only = work["method"] == "lora"
    method = {"lora": Lora(rank=work["rank"], alpha=2 * work["rank"])} if lora_only else {"train": Train()}
    cfg = SimpleNamespace(
        model=Model(
            path=str(folder), quantize=work.get("quantize"), attention=work.get("attention", "auto"), **fp8
        ),
        **method,
        **({"qat": Qat(scheme=work["qat"])} if work.get("qat") else {}),
        memory=memory(work),
        batch=SimpleNamespace(rows=work.get("rows"), micro_rows=work.get("rows")),
        data=SimpleNamespace(seq_len=work.get("seq_len")),
        loss=Loss(),
        output_dir=folder,
        parallel=Parallel(),
        optim=optimizer_of(work),
        from_scratch=True,
        dtype="bf16",
        seed=0,
    )
    run = processes.start(cfg.parallel, cfg.seed)
    model = build.model(cfg, run)
    with torch.no_grad():
        for name, tensor in base_state(model).items():
            if model.arch.tied and name == "lm_head.weight":
                continue
            value = common.weight(hugging_face_name(name), tensor.shape)
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(rounded(value, work["rounded"]) if work.get("rounded") and "_proj." in name else value)
            else:
                tensor.fill(value)  # quantized, one matrix at a time
        for name, _, factors in lora.adapted(model):
            factors.lora_A.copy_(common.weight(f"{name}.lora_A", factors.lora_A.shape))
    common.most_bytes = partial(graphs.peak, model)
    return model, run, cfg


def memory(work: dict) -> Memory:
    """The settings named, or what `memory.budget_gib` makes of a budget."""
    if work.get("budget_gib"):
        return Memory(budget_gib=work["budget_gib"])
    more = {key: work[key] for key in ("offload", "tiled_mlp", "cuda_graph") if work.get(key)}
    return Memory(recompute=work["recompute"], **more)


def optimizer_of(work: dict) -> Optim:
    """AdamW as the peers have it, or what was asked for."""
    asked = {key: work[key] for key in ("states", "rounding", "in_backward") if key in work}
    return Optim(name=work.get("optimizer", "adamw"), lr=1e-4, max_grad_norm=None, **asked)


def hugging_face_name(name: str) -> str:
    """Our parameter's name in a checkpoint (the families measured here differ in norms only)."""
    return name.replace("attn_pre", "input_layernorm").replace("mlp_pre", "post_attention_layernorm")


if __name__ == "__main__":
    main()
