"""Triton kernels on the CPU, through Triton's interpreter, in a process of their own: the switch is read at import."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")


def interpreted(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter cannot run loops with this NumPy (Triton 3.6 with NumPy 2.4)")
    assert done.returncode == 0, done.stderr[-3000:]


def test_cross_entropy_tile():
    interpreted(
        """
        import torch
        from ftlib.kernels.cross_entropy_triton import tile_triton
        from ftlib.kernels.linear_cross_entropy import tile_reference
        g = torch.Generator().manual_seed(0)
        for vocab in (1, 17, 70, 256):
            for scale, cap in ((1.0, None), (0.5, None), (1.3, 3.0)):
                logits = 4 * torch.randn(5, vocab, generator=g)
                labels = torch.randint(0, vocab, (5,), generator=g)
                exact = logits.double()
                nll = tile_reference(exact, labels, scale, cap)
                assert (tile_triton(logits, labels, scale, cap) - nll).abs().max() < 1e-5
                assert (logits - exact).abs().max() < 1e-6, (vocab, scale, cap)
        """
    )


def test_paged_attention():
    interpreted(
        """
        import sys
        sys.path.insert(0, "tests")
        import torch
        from unit.test_paged_attention import case
        from ftlib.kernels.paged_attention import paged_attention_reference
        from ftlib.kernels.paged_attention_triton import paged_attention_triton, paged_write_triton
        for heads, kv_heads, dim, page in ((3, 3, 16, 4), (8, 2, 24, 16)):
            q, k, v, table, positions, _ = case(heads, kv_heads, dim, page, lengths=(1, 17, 150))
            sinks = torch.randn(heads)
            for window, softcap, sink in ((None, None, None), (70, None, sinks), (1, 3.0, None)):
                terms = dict(page=page, scale=0.4, window=window, softcap=softcap, sinks=sink)
                exact = paged_attention_reference(q, k, v, table, positions, **terms)
                for splits in (1, 3):
                    found = paged_attention_triton(q, k, v, table, positions, splits=splits, **terms)
                    assert (found - exact).abs().max() < 1e-5, (heads, splits, terms)
        slots, wanted = torch.tensor([5, 0, 17]), k.clone()
        new, other = torch.randn(2, 3, *k.shape[1:])
        paged_write_triton(k, v, new, other, slots)
        assert torch.equal(k, wanted.index_copy(0, slots, new)) and torch.equal(v[slots], other)
        """
    )


def test_draw():
    interpreted(
        """
        import torch
        from ftlib.generation.params import SamplingParams
        from ftlib.kernels.draw import draw
        from ftlib.kernels.draw_triton import draw_triton
        for vocab in (5, 20000):
            keys = torch.tensor([SamplingParams(1).key(i) for i in range(6)])
            logits = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(0))
            positions = torch.tensor([0, 1, 2, 3, 1 << 20, 7])
            temperature = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.7])
            token, logprob = draw_triton(logits, keys, positions, temperature)
            exact = draw(logits, keys, positions, temperature)
            assert token.tolist() == exact[0].tolist() and (logprob - exact[1]).abs().max() < 1e-5, vocab
        """
    )


def test_embedding_rows():
    interpreted(
        """
        import torch
        from ftlib.kernels.host_embedding import host_embedding, host_embedding_reference
        for dim in (1, 24, 130):
            table, ids = torch.randn(33, dim), torch.randint(0, 33, (2, 7))
            assert torch.equal(host_embedding(ids, table), host_embedding_reference(ids, table))
        """
    )


def test_nf4():
    interpreted(
        """
        import torch
        from ftlib.kernels import nf4
        from ftlib.kernels.nf4_triton import dequantize_blocks
        levels = torch.tensor(nf4.LEVELS)
        def kernel(codes, scales, steps, mean, dtype, out=None):
            run = nf4.group(scales, steps)
            return dequantize_blocks(codes, scales, steps, mean, levels, run, dtype, out)
        for shape in ((3, 64), (40, 192), (64, 320)):
            for dtype in (torch.float32, torch.float16):
                parts = nf4.quantize(torch.randn(*shape)).values()
                exact = nf4.dequantize_reference(*parts, dtype)
                assert torch.equal(kernel(*parts, dtype), exact), shape
                wider = torch.zeros(shape[0] + 2, shape[1] + 6, dtype=dtype)
                kernel(*parts, dtype, out=wider[1:-1, 2:-4])
                assert torch.equal(wider[1:-1, 2:-4], exact) and wider.count_nonzero() == exact.count_nonzero()
                rows = shape[0] // 2  # what one process of two keeps: a step is shared by fewer scales
                piece = nf4.cut(nf4.quantize(torch.randn(*shape)), shape, (0, rows, rows)).values()
                assert torch.equal(kernel(*piece, dtype), nf4.dequantize_reference(*piece, dtype)), shape
        """
    )


def test_codes_with_a_scale_a_row():
    interpreted(
        """
        import torch
        from ftlib.kernels.rowwise_triton import dequantize_rows
        from ftlib.quant.rowwise import dequantize_reference, quantize
        for kind in (torch.int8, torch.float8_e4m3fn):
            for shape in ((1, 16), (7, 130), (9, 2048)):
                for dtype in (torch.float32, torch.float16):
                    weight = torch.randn(*shape) * torch.logspace(-3, 1, shape[0])[:, None]
                    codes, scales = quantize(weight, kind).values()
                    exact = dequantize_reference(codes, scales, dtype)
                    assert torch.equal(dequantize_rows(codes, scales, dtype), exact), (kind, shape, dtype)
                    wider = torch.zeros(shape[0] + 2, shape[1] + 6, dtype=dtype)
                    dequantize_rows(codes, scales, dtype, out=wider[1:-1, 2:-4])
                    assert torch.equal(wider[1:-1, 2:-4], exact) and wider.count_nonzero() == exact.count_nonzero()
                    half = slice(shape[1] // 2, None)
                    assert torch.equal(dequantize_rows(codes[:, half], scales, dtype), exact[:, half]), shape
        """
    )


def test_adamw():
    """All kinds of states, codes and bf16 with noise bit for bit (its casts cut bf16 off, and fp8's lose carries)."""
    interpreted(
        """
        import torch
        from ftlib.kernels.adamw_triton import adamw_triton
        from ftlib.optim.adamw import move_reference
        from ftlib.optim.lowbit import encode_moments, tables

        cpu, terms = torch.device("cpu"), (0.1, 0.95, 0.05, 1e-8, 0.999, 1e-2, 0.3)
        for case, kind in enumerate(("int8", "fp8", "int4", "", "int8", "int4", "")):
            block, dtype = (128, 112, 16, 333, 250, 98, 8)[case], (torch.float32, torch.bfloat16)[case // 4]
            place = (12345 - 2**31, -77) if dtype == torch.bfloat16 else None
            torch.manual_seed(case)
            p, grad, m = (torch.randn(37, block) for _ in range(3))
            m, grad = m * torch.logspace(-9, 0, block), grad * torch.logspace(-6, 0, block)
            m[3] = grad[3] = 0
            found = tables(kind, cpu)
            slots = encode_moments(m, m.square(), kind, found) if kind else [m, m.square()]
            for gate in (None, torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])):
                mine, theirs = ([p.to(dtype, copy=True), *(x.clone() for x in slots)] for _ in range(2))
                for step, (at, *slots_) in ((adamw_triton, mine), (move_reference, theirs)):
                    step(at, grad.to(dtype), slots_, kind, found, terms, gate, place)
                for a, b in zip(mine, theirs, strict=True):
                    if a.dtype == torch.float8_e4m3fn:
                        a, b = a.float(), b.float()
                        assert ((a - b).abs() <= b.abs() / 2 + 2**-9).all() and (a == b).float().mean() > 0.85
                    elif a.dtype == torch.float32:
                        assert ((a - b).abs() <= 2e-7 * b.abs() + 1e-9).all(), (kind, block, dtype, gate)
                    else:
                        assert torch.equal(a, b), (kind, block, dtype, gate)
                assert torch.equal(mine[0], p.to(dtype)) == (gate is not None and gate[1] == 0)
        """
    )
