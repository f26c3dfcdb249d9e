"""The norm of gradients that are gone: a fault that was planted took each one's in bfloat16, up to 0.4 % off."""

import torch
from torch import nn

from ftlib import optim
from ftlib.sections import Optim


def test_the_norm_of_bfloat16_gradients_is_exact():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).bfloat16()
    optimizer = optim.build(model, Optim(lr=1e-3, max_grad_norm=None, in_backward=True))
    for _ in range(3):
        x = torch.randn(16, 7, generator=g).bfloat16()
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        model(x).square().sum().backward()
        exact = torch.cat([grad.double().flatten() for grad in wanted]).norm()
        assert abs(optim.step(optimizer, None).double() - exact) < 1e-5 * exact
        assert all(p.grad is None for p in model.parameters())
