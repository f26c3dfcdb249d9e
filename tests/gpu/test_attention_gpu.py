"""Attention with sinks and with soft-capped scores on the GPU's kernels against the plain formula in float32."""

import pytest
import torch

from ftlib.layers.attention import attend
from ftlib.layers.batch import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("ends", "extent"),
    [([0, 300, 512, 700, 1024, 1024], None), ([0, 300, 512, 700, 1024, 1024], [4, 324]), ([0, 512, 1024], None)],
    ids=["packed", "this batch's own extent", "dense"],
)
@pytest.mark.parametrize(("backend", "dim"), [("varlen", 64), ("flex", 64), ("flex", 256)])
def test_output_and_gradients(backend, dim, ends, extent, window, compiled):
    """`varlen` with sinks, `flex` with capped scores."""
    g = torch.Generator("cuda").manual_seed(0)
    ends = torch.tensor(ends, dtype=torch.int32, device="cuda")
    extent = None if extent is None else torch.tensor(extent, dtype=torch.int32)
    q, k, v = (torch.randn(2, 512, heads, dim, generator=g, device="cuda") for heads in (8, 2, 2))
    inputs = (q, k, v, torch.randn(8, generator=g, device="cuda"))[: 3 if backend == "flex" else 4]
    weight = torch.sin(3 * q)
    softcap = 3.0 if backend == "flex" else None

    def run(backend, dtype):
        layout = Layout.packed(ends, 512, (2, 512), extent)
        layout.prepare(backend, {window})
        parts = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        function = torch.compile(attend, fullgraph=True) if compiled and backend != "reference" else attend
        terms = {"sinks": parts[3]} if len(parts) == 4 else {"softcap": softcap}
        y = function(*parts[:3], layout, backend=backend, window=window, **terms)
        return y, *torch.autograd.grad((y.float() * weight).sum(), parts)

    for ours, exact in zip(run(backend, torch.bfloat16), run("reference", torch.float32), strict=True):
        assert float((ours.float() - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("length", [1, 37, 101, 200])
def test_capped_scores_of_short_rows(length):
    """Fewer queries than a tile has, as short answers are scored."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 64, generator=g, device="cuda") for heads in (4, 2, 2))
    found = []
    for backend, dtype in (("flex", torch.bfloat16), ("reference", torch.float32)):
        ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device="cuda")
        layout = Layout.packed(ends, length, (2, length))
        layout.prepare(backend, {None})
        parts = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        y = attend(*parts, layout, backend=backend, window=None, softcap=3.0)
        found.append((y, *torch.autograd.grad((y.float() * torch.sin(3 * q)).sum(), parts)))
    for ours, exact in zip(*found, strict=True):
        assert float((ours.float() - exact).norm()) < 2e-2 * float(exact.norm()) + 1e-3
