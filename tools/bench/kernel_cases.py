"""What tools/bench/kernels.py measures: each operation of ftlib/kernels and ftlib/layers at a model's shapes.

A case names its operands and who computes it: `ours`, what a run on a GPU calls; `compiled`, the plain formula through
torch.compile; `liger`, Liger-Kernel's operation, where it has one; `plain`, the formula as it stands, where compiling
it is hopeless. The formula in float64 is the truth for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlib.kernels import nf4
from ftlib.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from ftlib.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ftlib.kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference
from ftlib.kernels.lora_linear import lora_project, lora_project_reference
from ftlib.kernels.paged_attention import paged_attention, paged_attention_reference
from ftlib.kernels.varlen_attention import varlen_attention
from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import rotate
from ftlib.optim.adamw import move_reference
from ftlib.optim.lowbit import block_size, encode_moments, tables
from ftlib.quant import rowwise  # and torch.ops.ftlib.frozen_linear with it

RANK, PAGE, EPS = 16, 16, 1e-6
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """`operands(make)` gives tensors; those that require a gradient are differentiated. `plain` is the truth."""

    kernel: str
    sizes: str
    operands: Callable[["Maker"], list[Tensor]]
    plain: Function
    ours: Function | None = None  # None: what ftlib runs is `plain`, compiled with its block
    liger: Callable[[], Function] | None = None
    exact: Function | None = None  # the truth, where `plain` in float64 takes too much memory
    only_gpu: bool = False  # ours
    compiles: bool = True  # `plain`


@dataclass
class Maker:
    """Draws operands: the same ones for the same case."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return drawn.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device, dtype=dtype)


def cases(shape: dict, tokens: int) -> Iterator[Case]:
    """Every case of a dense model whose config.json is `shape`, over `tokens` tokens (the head: half of them)."""
    dim, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    kv, width = shape["num_key_value_heads"], shape.get("head_dim") or dim // heads
    yield from head(dim, shape["vocab_size"], tokens // 2)
    yield from norms(dim, tokens)
    yield rope(heads, kv, width, tokens)
    yield swiglu(inner, tokens)
    for name, inputs, outs in (
        ("qkv", dim, (heads * width, kv * width, kv * width)),
        ("gate, up", dim, (inner, inner)),
        ("down", inner, (dim,)),
    ):
        yield lora(name, inputs, outs, tokens)
    yield from quantized(dim, inner, tokens)
    yield optimizer(dim, inner)
    yield packed_attention(heads, kv, width, tokens)
    yield pages(heads, kv, width, sequences=max(2, tokens // 128), context=max(32, tokens // 4))


def head(dim: int, vocab: int, tokens: int) -> Iterator[Case]:
    """The loss and the log-probabilities of a frozen head."""

    def operands(make: Maker) -> list[Tensor]:
        hidden = make.normal(tokens, dim, grad=True)
        return [hidden, make.normal(vocab, dim, scale=dim**-0.5), make.integers(vocab, tokens)]

    def liger() -> Function:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        return lambda h, w, labels: Fused.apply(h, w, labels, None, None, -100, 0.0, 0.0, "sum")[0]

    sizes = f"{tokens} x {dim} x {vocab}"
    yield Case("linear cross-entropy", sizes, operands, linear_cross_entropy_reference,
               lambda h, w, labels: linear_cross_entropy(h, w, labels, targets=tokens), liger)  # fmt: skip
    yield Case("linear log-probabilities", sizes, operands, lambda *a: linear_logprobs_reference(*a)[0],
               lambda h, w, labels: linear_logprobs(h, w, labels, targets=tokens))  # fmt: skip


def norms(dim: int, tokens: int) -> Iterator[Case]:
    """RMSNorm alone, and behind the sum of a residual stream and a branch."""
    with torch.device("meta"):
        module = RMSNorm(dim, EPS)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def after_sum(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x + branch, weight), x + branch

    def liger() -> Function:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True)

    def liger_sum() -> Function:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, branch, weight: LigerFusedAddRMSNormFunction.apply(branch, x, weight, EPS)

    def operands(make: Maker) -> list[Tensor]:
        return [make.normal(tokens, dim, grad=True), make.normal(dim, grad=True)]

    def three(make: Maker) -> list[Tensor]:
        return [make.normal(tokens, dim, grad=True), *operands(make)]

    yield Case("RMSNorm", f"{tokens} x {dim}", operands, norm, liger=liger)
    yield Case("residual + RMSNorm", f"{tokens} x {dim}", three, after_sum, liger=liger_sum)


def rope(heads: int, kv: int, width: int, tokens: int) -> Case:
    """Queries and keys turned."""

    def operands(make: Maker) -> list[Tensor]:
        angle = torch.arange(tokens, device=make.device)[None, :, None] * 1e-4 ** torch.linspace(
            0, 1, width // 2, device=make.device
        )
        q, k = (make.normal(1, tokens, h, width, grad=True) for h in (heads, kv))
        return [q, k, angle.cos().to(q.dtype), angle.sin().to(q.dtype)]

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def liger() -> Function:
        from liger_kernel.ops.rope import LigerRopeFunction

        def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            both = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            turned = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *both)
            return tuple(t.transpose(1, 2) for t in turned)

        return turn

    return Case("RoPE", f"{tokens} x {heads}/{kv} x {width}", operands, plain, liger=liger)


def swiglu(inner: int, tokens: int) -> Case:
    """silu(gate) * up."""

    def operands(make: Maker) -> list[Tensor]:
        return [make.normal(tokens, inner, grad=True) for _ in range(2)]

    def liger() -> Function:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    return Case("SwiGLU", f"{tokens} x {inner}", operands, lambda gate, up: F.silu(gate) * up, liger=liger)


def lora(name: str, dim: int, outs: tuple[int, ...], tokens: int) -> Case:
    """Sibling projections with adapters of rank 16."""
    out, ranks, scale = sum(outs), RANK * len(outs), 2.0

    def operands(make: Maker) -> list[Tensor]:
        x = make.normal(tokens, dim, grad=True)
        a = [make.normal(RANK, dim, scale=dim**-0.5, grad=True) for _ in outs]
        b = [make.normal(o, RANK, scale=0.1, grad=True) for o in outs]
        stacked = x.new_zeros(out + ranks, dim + ranks, requires_grad=False)
        stacked[:out, :dim] = make.normal(out, dim, scale=dim**-0.5)
        row = 0
        for i, (low, high) in enumerate(zip(a, b, strict=True)):
            at = slice(i * RANK, (i + 1) * RANK)
            stacked[out:, :dim][at] = low.detach()
            stacked[row : row + len(high), dim:][:, at] = high.detach()
            row += len(high)
        return [x, stacked, *a, *b]

    def call(project: Function) -> Function:
        count = len(outs)
        return lambda x, stacked, *factors: project(x, stacked, factors[:count], factors[count:], scale)

    sizes = f"{tokens} x {dim} x {'+'.join(map(str, outs))}"
    return Case(f"LoRA linear ({name})", sizes, operands, call(lora_project_reference), call(lora_project))


def quantized(dim: int, inner: int, tokens: int) -> Iterator[Case]:
    """An NF4 matrix made whole, and multiplied with; one of 8-bit codes made whole."""

    def parts(make: Maker) -> list[Tensor]:
        return list(nf4.quantize(make.normal(inner, dim, scale=dim**-0.5)).values())

    def operands(make: Maker) -> list[Tensor]:
        return [make.normal(tokens, dim, grad=True), *parts(make)]

    def exact(scales: Tensor) -> torch.dtype:
        return torch.float64 if scales.dtype == torch.float64 else torch.bfloat16

    def whole(codes: Tensor, scales: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
        return nf4.dequantize_reference(codes, scales, steps, mean, exact(mean))

    yield Case("NF4 to weights", f"{inner} x {dim}", parts, whole,
               lambda *parts: nf4.dequantize(*parts, torch.bfloat16))  # fmt: skip
    yield Case("fp8 codes to weights", f"{inner} x {dim}",
               lambda make: [*rowwise.quantize(make.normal(inner, dim), torch.float8_e4m3fn).values()],
               lambda codes, scales: rowwise.dequantize_reference(codes, scales, exact(scales)),
               lambda *parts: rowwise.dequantize(*parts, torch.bfloat16))  # fmt: skip
    yield Case("NF4 linear", f"{tokens} x {dim} x {inner}", operands,
               lambda x, *parts: F.linear(x, whole(*parts)),
               lambda x, *parts: torch.ops.ftlib.frozen_linear(x, list(parts), "nf4"))  # fmt: skip


def optimizer(dim: int, inner: int) -> Case:
    """A step of AdamW for one matrix whose moments are kept in 8 bits."""
    block, terms = block_size(dim, "int8"), (0.1, 0.95, 0.05, 1e-8, 0.999, 1e-2, 0.3)

    def operands(make: Maker) -> list[Tensor]:
        weight, grad, m = (make.normal(inner * dim // block, block) for _ in range(3))
        found = tables("int8", make.device)
        return [weight, grad, *encode_moments(m.float(), m.float() ** 2, "int8", found), *found]

    def by(step: Callable[..., None]) -> Function:
        def moved(weight: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            step(weight, grad, rest[:4], "int8", rest[4:], terms, None, None)
            return weight, rest[1], rest[3]

        return moved

    def ours(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
        from ftlib.kernels.adamw_triton import adamw_triton  # Triton is there where there is a GPU

        return by(adamw_triton)(*given)

    return Case("AdamW, states in int8", f"{inner} x {dim}", operands, by(move_reference), ours, only_gpu=True)


def packed_attention(heads: int, kv: int, width: int, tokens: int) -> Case:
    """Causal attention over documents of uneven lengths in one row; the rival is SDPA with a mask of all pairs."""
    ends = sorted({0, tokens, *(int(tokens * share) for share in (0.03, 0.1, 0.12, 0.3, 0.36, 0.5, 0.55, 0.8, 0.9))})
    longest = max(b - a for a, b in pairwise(ends))

    def operands(make: Maker) -> list[Tensor]:
        cu = torch.tensor(ends, dtype=torch.int32, device=make.device)
        return [*(make.normal(tokens, h, width, grad=True) for h in (heads, kv, kv)), cu]

    def plain(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        at = torch.arange(tokens, device=q.device)
        owner = torch.searchsorted(cu, at, right=True)
        mask = (owner[:, None] == owner) & (at[:, None] >= at)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))  # with a mask, grouped heads have no fast kernel
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu, longest, width**-0.5, None)

    def each(*qkv: Tensor) -> Tensor:
        parts = []
        for first, last in pairwise(ends):
            q, k, v = (t[first:last].transpose(0, 1)[None] for t in qkv[:3])
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts)

    sizes = f"{tokens} in {len(ends) - 1} documents x {heads}/{kv} x {width}"
    return Case("packed attention", sizes, operands, plain, ours, exact=each, only_gpu=True)


def pages(heads: int, kv: int, width: int, sequences: int, context: int) -> Case:
    """One new token each of some sequences, over keys and values in pages."""

    def operands(make: Maker) -> list[Tensor]:
        each = -(-context // PAGE)
        order = torch.randperm(sequences * each, generator=make.generator, device=make.device)
        pools = [make.normal(sequences * each * PAGE, kv, width) for _ in range(2)]
        positions = context // 2 + make.integers(context - context // 2, sequences)
        return [make.normal(sequences, heads, width), *pools, order.int().view(sequences, each), positions]

    terms = {"page": PAGE, "scale": width**-0.5}
    return Case("paged attention", f"{sequences} x {context} keys x {heads}/{kv} x {width}", operands,
                lambda *a: paged_attention_reference(*a, **terms), lambda *a: paged_attention(*a, **terms))  # fmt: skip


def experts(shape: dict, tokens: int) -> Case:
    """The first product of a mixture of experts; the rival is a loop over them, not compiled."""
    count, dim, inner = shape["num_experts"], shape["hidden_size"], shape["moe_intermediate_size"]
    rows = tokens * shape["num_experts_per_tok"]

    def operands(make: Maker) -> list[Tensor]:
        share = torch.rand(count, generator=make.generator, device=make.device).cumsum(0)
        ends = (share / share[-1] * rows).round().int()
        return [make.normal(rows, dim, grad=True), make.normal(count, 2 * inner, dim, scale=dim**-0.5), ends]

    sizes = f"{rows} rows, {count} experts of {dim} x {2 * inner}"
    return Case("grouped expert product", sizes, operands, grouped_linear_reference, grouped_linear, compiles=False)
