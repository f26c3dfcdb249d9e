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
