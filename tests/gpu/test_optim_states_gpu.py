"""Steps of AdamW by its kernel on a GPU against the plain formulas on the CPU."""

import pytest
import torch

from ftlib.optim.adamw import move
from ftlib.optim.lowbit import decode, encode_moments, tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, TERMS = torch.device("cpu"), (0.1, 0.95, 0.05, 1e-8, 0.999, 1e-2, 0.3)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("int8", 256), ("int8", 250), ("fp8", 256), ("fp8", 112), ("int4", 128), ("int4", 98), ("", 999)],
)
def test_the_kernel_is_the_formula(kind, block, dtype, stochastic, monkeypatch):
    from ftlib.kernels import adamw_triton

    kernel, calls = adamw_triton.adamw_triton, []
    monkeypatch.setattr(adamw_triton, "adamw_triton", lambda *given: (calls.append(1), kernel(*given)))
    place = (7 - 2**31, -77) if stochastic and dtype == torch.bfloat16 else None
    torch.manual_seed(block)
    p, grad, m = (torch.randn(301, block) for _ in range(3))
    m, grad = m * torch.logspace(-9, 0, block), (grad * torch.logspace(-6, 0, block)).to(dtype)
    m[3] = grad[3] = 0
    books = tables(kind, CPU)[:2]
    slots = encode_moments(m, m.square(), kind, books) if kind else [m, m.square()]
    for gate in (None, torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])):
        slow = [p.to(dtype, copy=True), *(x.clone() for x in slots)]
        fast = [x.cuda() for x in slow]
        move(slow[0], grad, slow[1:], kind, TERMS, gate, place)
        move(fast[0], grad.cuda(), fast[1:], kind, TERMS, None if gate is None else gate.cuda(), place)
        fast = [x.cpu() for x in fast]
        if gate is not None and not gate[1]:
            same = zip(fast, [p.to(dtype), *slots], strict=True)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in same)
            continue
        digit = 2**-7 if dtype == torch.bfloat16 else 1e-5  # a rounding more or less
        torch.testing.assert_close(fast[0].float(), slow[0].float(), rtol=digit, atol=1e-6)
        assert (fast[0] != slow[0]).float().mean() < (0.01 if dtype == torch.bfloat16 else 1.0)
        for i, wanted in enumerate(slow[1:]):
            if wanted.dtype == torch.float32:
                torch.testing.assert_close(fast[1 + i], wanted, rtol=1e-5, atol=1e-8)
            else:  # the nearest codes; between two that are as near, either
                assert (fast[1 + i].view(torch.uint8) != wanted.view(torch.uint8)).float().mean() < 1e-3
                values = [decode(*parts[1 + i : 3 + i], kind, books[i // 2]) for parts in (fast, slow)]
                assert (values[0] - values[1]).norm() < 1e-2 * values[1].norm()
    assert len(calls) == 3


def test_float64_is_not_for_the_kernel():
    """It computes in float32."""
    torch.manual_seed(0)
    p, grad = torch.randn(2, 3, 5, dtype=torch.float64)
    moments = [torch.zeros_like(p) for _ in range(2)]
    there = [x.cuda() for x in (p, grad, *moments)]
    move(p, grad, moments, "", TERMS, None, None)
    move(there[0], there[1], there[2:], "", TERMS, None, None)
    torch.testing.assert_close(there[0].cpu(), p, rtol=1e-14, atol=1e-14)
