"""The grid of the equality suite: which meshes, on which kind of run, are compared with one process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One training run of two steps. Mesh sizes, then what is trained and how."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    style: str = "ulysses"
    kind: str = "full"  # full, lora, dora, loftq, attention (LoRA on nothing else) or saved (with whole modules beside)
    # tied, norms on heads; qwen2: untied, biases; olmo2: norms over all heads, scalable softmax; llama: all biases;
    # mixtral, qwen3_moe: experts, some without a token; gpt_oss: with biases too, transposed, and sinks; wide: for NF4;
    # glm4_moe: experts chosen with a correction, and one for all; qwen2_moe: that behind a gate; olmoe: norms over all
    # heads beside experts; hunyuan: norms on heads that have turned; exaone4: a window, and a layer that turns nothing
    model: str = "qwen3"
    quantize: str = ""
    fp8: str = ""
    qat: str = ""  # from the first step on
    pack: bool = True
    micro_rows: int = 1  # accumulation = 8 rows / (micro_rows x data ranks)
    recompute: str = "none"
    tiled_mlp: int = 0
    compile: bool = False
    dtype: str = "fp64"
    offload: bool = False  # what backward needs waits elsewhere, copied late
    elastic: bool = False  # deterministic: elastic
    weighted: bool = False  # tokens count anything from 0 to 3

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp

    @property
    def mesh(self) -> str:
        sizes = [("HSDP" if self.shard > 1 else "DDP", self.replicate), ("FSDP", self.shard), ("CP", self.cp)]
        text = " x ".join(f"{name}{size}" for name, size in [*sizes, ("TP", self.tp)] if size > 1)
        return text + (f" ({self.style})" if self.cp > 1 else "")

    @property
    def work(self) -> str:
        words = [f"{self.kind} on {self.quantize}" if self.quantize else self.kind, self.model]
        words += [f"fp8 {self.fp8}"] * bool(self.fp8) + [f"qat {self.qat}"] * bool(self.qat)
        words += ["packed" if self.pack else "not packed", f"micro rows {self.micro_rows}"]
        words += ["recompute"] * (self.recompute != "none") + ["tiled"] * bool(self.tiled_mlp)
        words += ["offloaded"] * self.offload + ["compiled"] * self.compile
        words += ["elastic"] * self.elastic + ["weighted"] * self.weighted
        return ", ".join([*words, self.dtype])


GATHER, RING = "allgather", "ring"
# What every change runs: each mechanism once, every pair of options that has its own code path somewhere.
SHORT = [
    Case(shard=2),
    Case(shard=2, kind="lora", model="qwen2", micro_rows=2, recompute="full"),
    Case(shard=2, model="qwen2", offload=True),
    Case(shard=2, kind="lora", model="wide", quantize="nf4", recompute="full", offload=True),
    Case(replicate=2, model="qwen2"),
    Case(replicate=2, elastic=True, dtype="fp32"),
    Case(replicate=4, elastic=True, dtype="fp32", kind="lora"),
    Case(tp=2),
    Case(tp=2, model="qwen2", recompute="full", pack=False, micro_rows=2),
    Case(tp=2, kind="dora"),
    Case(tp=2, model="olmo2"),
    Case(tp=2, model="mixtral"),
    Case(tp=2, model="gpt_oss", recompute="full", micro_rows=2),
    Case(tp=2, kind="lora", model="qwen3_moe"),
    Case(tp=2, model="glm4_moe", micro_rows=2),
    Case(tp=2, model="qwen2_moe"),
    Case(tp=2, kind="lora", model="qwen2_moe", recompute="full"),
    Case(tp=2, model="olmoe"),
    Case(tp=2, model="hunyuan"),
    Case(replicate=2, weighted=True, elastic=True, dtype="fp32"),
    Case(tp=2, weighted=True),
    Case(cp=2, style=GATHER, weighted=True),
    Case(tp=2, kind="lora", model="wide", quantize="nf4"),
    Case(tp=2, kind="dora", model="wide", quantize="int8", recompute="full"),
    Case(tp=2, kind="lora", model="gpt_oss", quantize="fp8", micro_rows=2),
    Case(tp=2, kind="attention", model="wide", quantize="nf4"),
    Case(tp=2, kind="attention", model="qwen3_moe", quantize="int8"),
    Case(shard=2, kind="loftq", model="wide", quantize="nf4", recompute="full", dtype="fp32"),
    Case(shard=2, kind="lora", model="qwen3_moe", quantize="fp8"),
    Case(tp=2, kind="lora", model="glm4_moe", quantize="int8"),
    Case(shard=2, model="glm4_moe", recompute="full"),
    Case(shard=2, model="wide", fp8="tensorwise", recompute="full"),
    Case(shard=2, model="wide", fp8="rowwise", micro_rows=2),
    Case(shard=2, kind="lora", model="wide", fp8="tensorwise"),
    Case(shard=2, kind="lora", model="wide", qat="int4", recompute="full"),
    Case(shard=2, model="wide", qat="fp8", micro_rows=2),
    Case(replicate=2, model="wide", qat="int8_int4"),
    Case(cp=2, kind="lora", model="wide", qat="int8_int4"),
    Case(shard=2, tp=2, kind="loftq", model="wide", quantize="nf4"),
    Case(cp=2),
    Case(cp=2, model="exaone4"),
    Case(cp=2, style=GATHER, model="qwen2"),
    Case(cp=2, style=RING),
    Case(cp=2, style=RING, kind="lora", model="qwen2", recompute="full", micro_rows=2),
    Case(replicate=2, shard=2, micro_rows=2),
    Case(shard=2, tp=2, kind="lora", model="qwen2", recompute="full", tiled_mlp=7),
    Case(shard=2, tp=2, kind="lora", recompute="full", offload=True),
    Case(cp=2, tp=2, style=RING, model="qwen3_moe"),
    Case(shard=2, cp=2, kind="saved"),
    Case(shard=2, dtype="fp32", pack=False),  # rows of 8, 16 and 24 tokens, others on the other process
    Case(replicate=2, elastic=True, dtype="fp32", pack=False),
    Case(cp=2, kind="lora", model="qwen2", pack=False),
]
# Further ones of the slow grid.
MORE = [
    Case(tp=2, model="llama"),
    Case(tp=2, kind="lora", model="qwen2"),
    Case(cp=2, style=GATHER, kind="lora", recompute="full", micro_rows=2),
    Case(cp=2, tp=2, model="gpt_oss"),
    Case(shard=2, tp=2),
    Case(cp=4, style=RING, model="qwen2"),
    Case(cp=2, recompute="full", offload=True),
    Case(tp=2, offload=True),
    Case(shard=2, recompute="full", offload=True, compile=True),
    Case(shard=2, kind="lora", model="qwen2", offload=True, compile=True),
]


def wide() -> list[Case]:
    """Every mesh of 2, 4 and 8 processes on every kind of run: the slow grid."""
    meshes = [
        {"shard": 2}, {"replicate": 2}, {"tp": 2}, {"cp": 2}, {"cp": 2, "style": GATHER},
        {"shard": 4}, {"replicate": 2, "shard": 2}, {"shard": 2, "tp": 2}, {"replicate": 2, "tp": 2},
        {"shard": 2, "cp": 2}, {"cp": 2, "tp": 2, "style": GATHER}, {"cp": 4, "style": GATHER},
        {"cp": 2, "style": RING}, {"cp": 4, "style": RING},
        {"replicate": 2, "shard": 2, "tp": 2}, {"shard": 2, "cp": 2, "tp": 2}, {"replicate": 2, "cp": 2, "tp": 2,
        "style": GATHER}, {"replicate": 2, "shard": 2, "cp": 2}, {"shard": 8},
    ]  # fmt: skip
    runs = [
        {"kind": "full", "model": "qwen3"},
        {"kind": "full", "model": "qwen2", "pack": False, "recompute": "full"},
        {"kind": "lora", "model": "qwen2"},
        {"kind": "lora", "model": "qwen3", "recompute": "full"},
        {"kind": "dora", "model": "qwen3"},
        {"kind": "saved", "model": "qwen2"},
        {"kind": "full", "model": "qwen3", "dtype": "fp32"},
        {"kind": "full", "model": "gpt_oss", "recompute": "full"},
        {"kind": "lora", "model": "qwen3_moe"},
        {"kind": "saved", "model": "mixtral", "pack": False},
    ]
    found = [Case(**mesh, **run) for mesh in meshes for run in runs]
    found = [case for case in found if case.style != RING or case.model != "gpt_oss"]  # it has windows and sinks
    shapes = [*meshes[:5], {"cp": 2, "style": RING}]
    return found + MORE + [Case(**mesh, kind=kind, compile=True) for mesh in shapes for kind in ("full", "lora")]
