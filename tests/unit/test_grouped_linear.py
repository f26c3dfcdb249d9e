"""Grouped matrix products: the loop, torch's kernel, and routing that leaves experts without a token."""

import pytest
import torch

from ftlib.kernels import grouped_linear as kernel
from ftlib.layers.moe import Experts, Moe, MoeMlp

SIZES = {"even": [4, 4, 4], "skewed": [11, 1, 0], "none at all": [0, 0, 12], "last empty": [6, 6, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_loop_and_torch_agree(sizes):
    torch.manual_seed(0)
    x, weight = torch.randn(12, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    plain = kernel.grouped_linear_reference(x, weight, ends)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    assert torch.allclose(plain, torch.einsum("nd,nod->no", x, weight[owner]), atol=1e-5)
    assert torch.equal(kernel.owners(ends, 12), owner)
    if kernel._TORCH is None:
        pytest.skip("this torch has no grouped product")
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (plain, kernel._torch(x, weight, ends))]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
    inner = weight.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as adapters keep theirs: experts innermost
    assert inner.stride(0) == 1 and torch.allclose(kernel._torch(x, inner, ends), plain, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_equal_one_token_at_a_time(transposed):
    torch.manual_seed(0)
    spec = Moe(hidden=6, experts=5, top_k=2, bias=True, transposed=transposed)
    experts = Experts(spec, 4).double()
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    x, weights = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    chosen = torch.tensor([[0, 3]] * 5 + [[3, 0], [3, 1]])  # 2 and 4 get nothing
    y = experts(x, chosen, weights)
    for t in range(7):
        expected = 0
        for e, share in zip(chosen[t].tolist(), weights[t], strict=True):
            stacks = (experts.gate_up_proj.matrices[e], experts.down_proj.matrices[e])
            up, down = (w.mT for w in stacks) if transposed else stacks
            gate, rise = (up @ x[t] + experts.gate_up_proj.bias[e].flatten()).chunk(2)
            expected = expected + share * (down @ (torch.nn.functional.silu(gate) * rise) + experts.down_proj.bias[e])
        assert torch.allclose(y[t], expected)


def test_experts_without_a_token_have_zero_gradient_and_others_have_not():
    torch.manual_seed(0)
    mlp = MoeMlp(Moe(hidden=6, experts=4, top_k=1), 4)
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    with torch.no_grad():
        mlp.gate.weight[1:] = 0
        mlp.gate.weight[1] = -mlp.gate.weight[0]
    mlp(torch.randn(2, 9, 4)).square().sum().backward()
    used = mlp.experts.down_proj.weight.grad.flatten(1).abs().amax(1) > 0
    assert used.tolist() == [True, True, False, False]
