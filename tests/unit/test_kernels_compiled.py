"""Triton kernels compiled for GPUs that are not here: what the interpreter takes, the compiler may refuse."""

import pytest
import torch

from ftlib.optim.lowbit import encode_moments, tables

triton = pytest.importorskip("triton", reason="Triton is not installed here")
CPU, TERMS = torch.device("cpu"), (0.1, 0.95, 0.05, 1e-8, 0.999, 1e-2, 0.3)
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
slow = [pytest.mark.slow]  # last result (2026-11-23, Triton 3.6 and 3.9): passed


@pytest.fixture(params=[90, pytest.param(80, marks=slow), pytest.param(89, marks=slow), pytest.param(120, marks=slow)])
def compiled(request, monkeypatch):
    """(Names of kernels that were launched, each compiled for a GPU of this compute capability and not run; whether
    such a GPU has 8-bit floats)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    names = []

    def run(kernel, *args, grid, warmup, **named):
        options = {key: named.pop(key) for key in ("num_warps", "num_stages") if key in named}
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        constant = {p.name for p in kernel.params if p.is_constexpr} | {k for k, v in given.items() if v is None}
        signature = {key: "constexpr" if key in constant else kind_of(given[key]) for key in kernel.arg_names}
        constants = {(kernel.arg_names.index(key),): given[key] for key in constant}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        found = triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options)
        assert found.asm["ptx"]
        names.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    return names, request.param >= 89


def kind_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def test_adamw(compiled):
    from ftlib.kernels.adamw_triton import adamw_triton

    names, fp8 = compiled
    for kind, block in (("int8", 250), ("fp8", 256), ("int4", 98), ("", 333)):
        if kind == "fp8" and not fp8:
            continue
        p = torch.ones(5, block, dtype=torch.bfloat16)
        found = tables(kind, CPU)
        slots = encode_moments(p.float(), p.float(), kind, found) if kind else [p.float()] * 2
        adamw_triton(p, p, slots, kind, found, TERMS, torch.ones(2), (3, -7) if block != 250 else None)
    assert len(names) == 3 + fp8


def test_the_head(compiled):
    from ftlib.kernels.cross_entropy_triton import tile_triton
    from ftlib.kernels.draw_triton import draw_triton

    logits = torch.zeros(2, 5000, dtype=torch.bfloat16)
    for softcap in (None, 30.0):
        tile_triton(logits, torch.zeros(2, dtype=torch.int64), 1.0, softcap)
    draw_triton(logits, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    assert compiled[0] == ["_tile_kernel", "_tile_kernel", "_part", "_whole"]


def test_quantized_weights(compiled):
    from ftlib.kernels.nf4 import LEVELS
    from ftlib.kernels.nf4_triton import dequantize_blocks
    from ftlib.kernels.rowwise_triton import dequantize_rows

    names, fp8 = compiled
    bytes_, ones = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(16)
    levels = torch.as_tensor(LEVELS, dtype=torch.float32)
    dequantize_blocks(bytes_, bytes_.flatten()[:16].view(torch.int8), ones, ones[:1], levels, 16, torch.bfloat16)
    for codes in (bytes_.view(torch.int8), *[bytes_.view(torch.float8_e4m3fn)] * fp8):
        dequantize_rows(codes, ones[:8], torch.bfloat16)
    assert len(names) == 2 + fp8


def test_paged_attention(compiled):
    from ftlib.kernels.paged_attention_triton import paged_attention_triton, paged_write_triton

    pool = torch.zeros(64, 2, 128, dtype=torch.bfloat16)
    q, table = torch.zeros(3, 8, 128, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.int32)
    at = torch.zeros(3, dtype=torch.int64)
    for window, softcap, sinks, splits in ((None, None, None, 1), (7, 30.0, torch.zeros(8), 2)):
        terms = {"window": window, "softcap": softcap, "sinks": sinks, "splits": splits}
        paged_attention_triton(q, pool, pool, table, at, page=16, scale=0.1, **terms)
    paged_write_triton(pool, pool, pool[:3], pool[:3], at)
    assert compiled[0] == ["_attend", "_attend", "_merge", "_write"]
