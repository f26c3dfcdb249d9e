"""Steps of training on a mesh, and the same steps on one process."""

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from parallel.grid import Case
from parallel.late_copies import LateCopies
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from ftlib import build, optim, quant
from ftlib.adapters import lora
from ftlib.checkpoint import Saver, State
from ftlib.data import Documents, Loader
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import ssmax
from ftlib.models.load import DTYPES
from ftlib.models.save import hf_tensors
from ftlib.models.shards import fill
from ftlib.parallel import offload
from ftlib.parallel import run as processes
from ftlib.sections import Batch, Checkpoint, Lora, Memory, Model, Optim, Parallel, Qat

SEQ_LEN, ROWS, STEPS, SEED = 32, 8, 2, 7
NAMES = {
    "qwen3": "qwen3-0.6b", "qwen2": "qwen2.5-7b", "olmo2": "olmo-2-1b", "llama": "llama-3.1-8b",
    "mixtral": "mixtral-8x7b", "qwen3_moe": "qwen3-30b-a3b", "gpt_oss": "gpt-oss-20b", "wide": "llama-3.1-8b",
    "glm4_moe": "glm-4.5-air", "qwen2_moe": "qwen1.5-moe-a2.7b", "olmoe": "olmoe-1b-7b",
    "hunyuan": "hunyuan-1.8b", "exaone4": "exaone-4.0-32b",
}  # fmt: skip
DTYPES["fp64"] = torch.float64


def write_models(folder: Path) -> None:
    """Tiny models of several families with every weight random, biases and norms too."""
    import json

    from parity.shrink import reference, shrunk

    for name, source in NAMES.items():
        more = {"tie_word_embeddings": name == "qwen3"}
        more |= {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
        more |= {"layer_types": ["sliding_attention", "full_attention"]} if name == "exaone4" else {}
        sizes = {"num_hidden_layers": 2, "intermediate_size": 64}
        if name == "wide":  # whole blocks of NF4 on each process, and six of them a row: groups of scales are cut
            sizes |= {"hidden_size": 128, "head_dim": 32, "intermediate_size": 384}
        settings = shrunk(source, **sizes, **more)
        made = reference(settings)
        if name == "wide":  # largest numbers that differ between the processes
            for matrix in (weight for weight in made.model.layers.parameters() if weight.ndim == 2):
                matrix.data[: len(matrix) // 2] *= 3
        made.save_pretrained(folder / name)
        if name == "olmo2":
            settings = ssmax.configured(settings, 0.3)
            file, draws = folder / name / "model.safetensors", torch.Generator().manual_seed(1)
            factors = {f"model.layers.{i}.self_attn.ssmax": torch.rand(4, generator=draws) for i in range(2)}
            save_file(load_file(file) | factors, file)
        (folder / name / "config.json").write_text(json.dumps(settings))


def config(case: Case, models: Path) -> SimpleNamespace:
    """What build.model reads of a recipe's config."""
    cfg = SimpleNamespace(
        model=Model(
            path=str(models / case.model), quantize=case.quantize or None, fp8=case.fp8 or None, fp8_smallest=16
        ),
        memory=Memory(recompute=case.recompute, tiled_mlp=case.tiled_mlp, compile=case.compile, offload=case.offload),
        parallel=mesh(case),
        batch=Batch(rows=ROWS, micro_rows=case.micro_rows),
        deterministic="elastic" if case.elastic else False,
        dtype=case.dtype,
        seed=SEED,
    )
    if case.qat:
        cfg.qat = Qat(scheme=case.qat)
    if case.kind != "full":
        more = {"saved": {"modules_to_save": ("lm_head", "norm")}, "dora": {"dora": True}, "loftq": {"init": "loftq"}}
        more["attention"] = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
        cfg.lora = Lora(rank=8, **more.get(case.kind, {}))
        # Adapters are kept in float32; here nothing may be rounded.
        lora.attach_section.__kwdefaults__["dtype"] = DTYPES[case.dtype]
    return cfg


def mesh(case: Case) -> Parallel:
    return Parallel(dp_replicate=case.replicate, dp_shard=case.shard, cp=case.cp, tp=case.tp, cp_style=case.style)


def alone() -> SimpleNamespace:
    """A run of one process, wherever this is called."""
    one = SimpleNamespace(size=lambda: 1)
    one.get_group = lambda: one
    sizes = dict.fromkeys(("dp_replicate", "fsdp", "dp_shard", "cp", "tp"), one)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SimpleNamespace(
        device=device, rank=0, world=1, dense=sizes, data=sizes, data_rank=0, data_ranks=1, is_main=True,
        share=lambda batch: batch, total=lambda x: x,
    )  # fmt: skip


def documents(weighted: bool = False) -> Documents:
    """40 documents, a third of the tokens without loss; several of them share a row. `weighted`: half of them are."""
    random = np.random.default_rng(3)
    lengths = random.integers(3, SEQ_LEN // 2, 40)
    rows = [(random.integers(3, 160, n), random.random(n) < 0.7) for n in lengths]
    if weighted:
        rows = [(ids, mask * 3 * random.random(len(ids)) if n % 2 else mask) for n, (ids, mask) in enumerate(rows)]
    return Documents.from_rows(rows)


def train(case: Case, models: Path, run: object, first: int = 0, last: int = STEPS) -> dict[str, torch.Tensor]:
    """Losses and gradient norms of steps `first` to `last` and the gradients of step 0, with the weights after them."""
    state = fresh(case, models, run)
    done = steps(state, run, range(last))
    return {name: value for name, value in done.items() if step_of(name) >= first} | weights(state.model)


def fresh(case: Case, models: Path, run: object) -> State:
    """A model with its optimizer and data, before the first step."""
    offload.HostOffload = LateCopies
    model = build.model(config(case, models), run)
    if case.kind not in ("full", "loftq"):
        randomise(model)  # B = 0 would hide A
    # A large eps: else a gradient that is zero but for rounding moves its weight as far as any other.
    optimizer = optim.build(model, Optim(lr=1e-2, weight_decay=0.1, eps=1e-2))
    loader = Loader(
        documents(case.weighted), seq_len=SEQ_LEN, rows=ROWS, micro_rows=case.micro_rows, seed=SEED, pack=case.pack,
        pad_id=0, rank=run.data_rank, ranks=run.data_ranks, share=run.share if run.world > 1 else None, multiple=8,
    )  # fmt: skip
    return State(model, optimizer, loader)


def leg(case: Case, models: Path, run: object, folder: Path, first: int, last: int) -> dict[str, torch.Tensor]:
    """The same, from what another mesh has saved in `folder` after step `first`; saves after `last`."""
    state = fresh(case, models, run)
    saver = Saver(Checkpoint(), folder, run, {"seed": SEED}, say=lambda text: None)
    assert saver.resume(state) == first
    found = steps(state, run, range(first, last)) | weights(state.model)
    saver.save(last, state)
    return found


def step_of(name: str) -> int:
    return 0 if name.startswith("grad ") else int(name.split()[1])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that is trained, and the model as it would be exported."""
    trained = {f"weight {name}": whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return trained | {f"weight exported {key}": tensor for key, tensor in hf_tensors(model)}


def steps(state: State, run: object, which: range) -> dict[str, torch.Tensor]:
    """Losses and gradient norms of these steps, gradients of step 0; whole tensors."""
    model, loader, found = state.model, state.loader, {}
    replicas = state.optimizer.replicas
    for step in which:
        quant.at(step + 1, model)
        batch, total = next(loader), torch.zeros((), dtype=torch.float64, device=run.device)
        for micro in batch.micro_batches:
            micro = micro.to(run.device)
            hidden = model(micro)
            head = model.lm_head.weight
            part = next_token_loss(hidden, head, micro.labels, micro.target_tokens, weights=micro.weights)
            part = part / batch.target_weight
            part.backward()
            total += part.detach()
        found[f"loss {step}"] = run.total(total)
        if step == 0:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if replicas is not None:
                replicas.sum(trained.values())
            found |= {f"grad {name}": whole(p.grad) for name, p in trained.items() if p.grad is not None}
        state.optimizer.replicas = None if step == 0 else replicas  # else they would be summed twice
        found[f"norm {step}"] = optim.step(state.optimizer, 1.0).double()
    return found


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for _, _, factors in lora.adapted(model):
        for name in ("lora_A", "lora_B"):
            target = factors.stored(name)
            fill(target, 0.2 * torch.randn(target.shape, generator=generator, dtype=torch.float64))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest relative difference of each kind of number; infinite where the two have different tensors."""
    worst = dict.fromkeys(("loss", "grad", "norm", "weight"), 0.0)
    if found.keys() != wanted.keys():
        missing = sorted(found.keys() ^ wanted.keys())
        return dict.fromkeys(worst, float("inf")) | {"differs": missing[:4]}
    for name, value in wanted.items():
        kind = name.split()[0]
        scale = float(value.abs().max()) or 1.0
        difference = float((found[name].cpu() - value.cpu()).abs().max()) / scale
        worst[kind] = max(worst[kind], difference if difference == difference else float("inf"))
    return worst


def one_process(case: Case) -> Case:
    """The same work without a mesh."""
    plain = {"recompute": "none", "tiled_mlp": 0, "offload": False, "compile": False}
    return dataclasses.replace(case, replicate=1, shard=1, cp=1, tp=1, **plain)


def start(case: Case) -> processes.Run:
    """Cases of one mesh share its groups, each of which has threads that wake a hundred times a second."""
    return _started(mesh(case))


@cache
def _started(asked: Parallel) -> processes.Run:
    return processes.start(asked, SEED)
