"""What a training step should take on a mesh: memory, bytes between GPUs, time. From a model on meta and a few rates
that were measured on one GPU and two; headline.py shows how far it is off where both are known."""

import json
import statistics
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import common
from parallel import world
from parallel_step import TINY, settings
from sft import mfu

from ftlib import preflight, quant
from ftlib.adapters import setup as adapters
from ftlib.layers.linear import Linear
from ftlib.models import LanguageModel, load
from ftlib.models.load import DTYPES
from ftlib.parallel import check

RESULTS = Path(__file__).parent / "results"
COPY = 2.96e12  # bytes a second that an H100 reads and writes (a large copy)
# One profiled step of Llama-3.1-8B, LoRA, 2 x 4096 tokens, nothing recomputed (LOG.md): 532 ms, or 581 with adapters as
# products of their own, of which matrix products 345 and attention 70; the rest is passes over what blocks keep.
STEP, UNFUSED, PRODUCTS, ATTENTION = 0.5322, 0.5812, 0.345, 0.070
SPEED_UP = {4096: 1.0, 8192: 505 / 441, 32768: 557 / 441}  # of torch's cuDNN attention with the length of a document
NF4_BYTES, WIDE_BYTES = 0.516, 2  # of a weight, as it is kept and made whole


@dataclass(frozen=True)
class Sizes:
    """Numbers in matrices of a model on meta, and what adapters add."""

    blocks: int  # all matrices of all blocks, of the model itself
    last: int  # of these, the last product of each block, which is not repeated when a block is recomputed
    head: int
    block_bytes: int  # that FSDP gathers for a block: parameters in bf16, codes of quantized matrices as they are
    edge_bytes: int  # of the embedding and of the head, each
    trained: int
    scores: float  # FLOP of attention's forward for a token
    kept: int  # numbers that blocks keep for backward, for each token and process
    states: float  # bytes that the optimizer reads and writes for a trained number


@dataclass(frozen=True)
class Estimate:
    """Of one step on each GPU: seconds, bytes that it receives, bytes of memory at the moment that takes the most."""

    work: dict
    memory: dict[str, int]
    peak: str
    checkpoint: int
    seconds: dict[str, float]
    bytes: dict[str, float]
    exposed: dict[str, float] = field(default_factory=dict)  # seconds of communication that nothing else covers

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        return sum(self.seconds.values()) + sum(self.exposed.values())

    @property
    def per_gpu(self) -> float:
        """Tokens a second."""
        return self.work["rows"] * self.work["seq_len"] / self.step / world(self.work)

    def mfu(self) -> float:
        """By the rule of sft.py, over 744 TFLOP/s."""
        return mfu({"work": self.work | {"method": self.work["kind"]}, "tokens_per_s": self.per_gpu})["mfu_measured"]


def build(work: dict) -> tuple[LanguageModel, SimpleNamespace]:
    """The model of a case on meta, adapters attached, and the config that a process of it has; UserError where they do
    not go together."""
    shape = common.config_of(work["shape"]) | (TINY if work.get("tiny") else {})
    cfg = settings(work, shape)
    quant.check(cfg, shape)
    model = on_meta(json.dumps(shape), work["kind"], work.get("quantize"))
    check.check(model, cfg, cfg.parallel.cp, cfg.parallel.tp)
    return model, cfg


@cache
def on_meta(shape: str, kind: str, quantize: str | None) -> LanguageModel:
    """The model of a config.json (as text), quantized and with adapters as a case asks for."""
    mesh = {"dp_shard": 1}
    work = {"kind": kind, "quantize": quantize, "recompute": "none", "mesh": mesh, "rows": 1, "micro_rows": 1}
    cfg = settings(work | {"seq_len": 1}, json.loads(shape))
    model = load.build(Path(cfg.model.path), DTYPES[cfg.dtype])
    quant.attach(model, cfg)
    if kind == "lora":
        adapters.attach(model, cfg.lora)
    return model


def estimate(work: dict, link: float) -> Estimate:
    """`work` is a case of parallel.py; `link`: bytes a second that a GPU receives from the others."""
    model, cfg = build(work)
    mesh = cfg.parallel
    need = preflight.need(model, cfg, mesh.dp_shard * mesh.cp * mesh.tp)
    sizes = measure(model, cfg)
    micro_batches = work["rows"] // (work["micro_rows"] * mesh.dp_replicate * mesh.dp_shard)
    tokens = micro_batches * work["micro_rows"] * work["seq_len"] // mesh.cp
    seconds = compute(work, sizes, tokens, mesh)
    received = communication(work, model, sizes, tokens, micro_batches, mesh)
    return Estimate(
        work, need.moments[need.peak], need.peak, need.checkpoint, seconds, received,
        exposed(model, sizes, seconds, received, micro_batches, mesh, link),
    )  # fmt: skip


def measure(model: LanguageModel, cfg: SimpleNamespace) -> Sizes:
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, Linear)}
    count = {name: (m.base if hasattr(m, "base") else m.weight).shape.numel() for name, m in linears.items()}
    mixers, block = [layer.mixer for layer in model.arch.layers], model.model.layers[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    stepped = sum(2 * p.numel() * (p.element_size() + cfg.optim.state_bytes(p.element_size())) for p in trained)
    return Sizes(
        blocks=sum(count.values()),
        last=sum(n for name, n in count.items() if name.endswith("down_proj")),
        head=model.lm_head.weight.numel(),
        block_bytes=sum(2 * p.numel() for p in block.parameters())
        + sum(b.numel() * b.element_size() for b in block.buffers() if b.ndim > 1),
        edge_bytes=2 * model.lm_head.weight.numel(),
        trained=sum(p.numel() for p in trained),
        scores=sum(2.0 * cfg.data.seq_len * m.heads * m.head_dim for m in mixers),
        kept=sum(preflight.block_elements(model.arch, x, cfg.data.seq_len, 1.0, cfg.parallel.tp)
                 for x in model.arch.layers),
        states=stepped / max(1, sum(p.numel() for p in trained)),
    )  # fmt: skip


def rates(length: int, fused: bool) -> tuple[float, float, float]:
    """(FLOP/s of matrix products, of attention over documents of `length` tokens, passes over what blocks keep)."""
    tokens, matrices, head, heads, layers = 8192, 6_979_321_856, 525_336_576, 32 * 128, 32
    kept = layers * (4 * 4096 + 2 * (4096 + 2 * 1024) + 4096 + 3 * 14336)
    speed_up = SPEED_UP[max(known for known in SPEED_UP if known <= max(length, 4096))]
    rest = (STEP if fused else UNFUSED) - PRODUCTS - ATTENTION
    return (
        4 * (matrices + head) * tokens / PRODUCTS,
        6 * 4096 * heads * layers * tokens / ATTENTION * speed_up,
        rest * COPY / (2 * kept * tokens),
    )


def compute(work: dict, sizes: Sizes, tokens: int, mesh: object) -> dict[str, float]:
    """Seconds of one GPU for its share of a step."""
    again = work["recompute"] in ("full", "except_attention")
    alone = mesh.dp_shard * mesh.cp * mesh.tp == 1
    products, attention, passes = rates(work["seq_len"], fused=alone or work["kind"] == "full")
    repeated = 2 * (sizes.blocks - sizes.last) if again else 0
    flop = (4 if work["kind"] == "lora" else 6) * (sizes.blocks + sizes.head) + repeated
    scores = sizes.scores * (4 if work["recompute"] == "full" else 3)
    found = {
        "matrix products": flop * tokens / mesh.tp / products,
        "attention": scores * tokens / mesh.tp / attention,
        "the rest": passes * 2 * sizes.kept * tokens / COPY * (4 / 3 if again else 1),
        "optimizer": sizes.trained / (mesh.dp_shard * mesh.cp * mesh.tp) * sizes.states / COPY,
    }
    if work.get("quantize"):
        times = 2 * sizes.blocks + (sizes.blocks - sizes.last if again else 0)
        micro_batches = tokens * mesh.cp // (work["micro_rows"] * work["seq_len"])
        found["made whole"] = micro_batches * times / mesh.tp * (NF4_BYTES + WIDE_BYTES) / COPY
    return found


def communication(
    work: dict, model: LanguageModel, sizes: Sizes, tokens: int, micro_batches: int, mesh: object
) -> dict[str, float]:
    """Bytes that a GPU receives in a step, by what asks for them."""
    arch, layers = model.arch, len(model.arch.layers)
    again = 1 if work["recompute"] in ("full", "except_attention") else 0

    def others(size: int) -> float:
        return (size - 1) / size

    shards = mesh.dp_shard * mesh.cp
    gathered = (2 * layers * sizes.block_bytes + 2 * sizes.edge_bytes) / mesh.tp
    mixer, hidden = arch.layers[0].mixer, 2 * tokens * arch.dim
    heads = 2 * tokens * (2 * mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim / mesh.tp
    found = {
        "weights": micro_batches * gathered * others(shards),
        "gradients": micro_batches * 4 * sizes.trained / mesh.tp * others(shards)
        + 2 * 4 * sizes.trained / (shards * mesh.tp) * others(mesh.dp_replicate),
        "tp": (layers * (8 + 3 * again) + 4) * hidden * others(mesh.tp),
        "cp": layers * (2 + again) * heads * others(mesh.cp),
    }
    return {name: size for name, size in found.items() if size}


def exposed(
    model: LanguageModel, sizes: Sizes, seconds: dict, received: dict, micro_batches: int, mesh: object, link: float
) -> dict[str, float]:
    """Seconds in which a GPU only waits. `tp` and `cp` are in the way of what comes next. Weights come while the block
    before is computed: what is left is the first block, the embedding, the head, and what is longer than a block."""
    found = {name: received[name] / link for name in ("tp", "cp") if name in received}
    shards, layers = mesh.dp_shard * mesh.cp, len(model.arch.layers)
    if shards > 1:
        part = (shards - 1) / shards / mesh.tp / link
        step = sum(value for name, value in seconds.items() if name != "optimizer") / micro_batches
        block, edge = sizes.block_bytes * part, sizes.edge_bytes * part
        reduced = received["gradients"] / link / micro_batches
        longer = max(0.0, layers * block - step / 3) + max(0.0, layers * block + reduced - step * 2 / 3)
        found["weights"] = micro_batches * (2 * edge + block + longer)
        found["gradients"] = reduced / layers  # of the last block
    elif "gradients" in received:
        found["gradients"] = received["gradients"] / link
    return found


@cache
def link_rates() -> dict[str, float]:
    """Bytes a second that each of two H200s received from the other while NCCL's kernels ran, by case."""
    rows = json.loads((RESULTS / "h200x2_meshes.json").read_text())["rows"]
    wanted = ("lora/dp_shard=2", "lora/tp=2", "70b/dp_shard=2")
    return {
        name: sum(estimate(rows[name]["work"], 1e11).bytes.values()) / rows[name]["nccl_ms"] * 1e3 for name in wanted
    }


def link() -> float:
    """Their median."""
    return statistics.median(link_rates().values())
