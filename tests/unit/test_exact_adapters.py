"""Adapters in half precision: what is added to a matrix or divided by its length is not rounded on the way."""

import pytest
import torch
from faults.tiny_training import one_process
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ftlib.adapters.factors import LoraFactors
from ftlib.layers.linear import Linear
from ftlib.parallel.apply import _gathered_in
from ftlib.quant.qat import RoundedLinear
from ftlib.quant.schemes import SCHEMES
from ftlib.sections import Lora


def layer(dora=False, scheme=None):
    """256 x 256 in bfloat16 with a trained adapter in float32."""
    torch.manual_seed(0)
    linear = Linear(256, 256, bias=False).bfloat16().requires_grad_(False)
    found = linear if scheme is None else RoundedLinear(linear, scheme, 32)
    factors = LoraFactors(linear, Lora(rank=8, dora=dora), 8, 16.0, torch.float32)
    found.adapters, found.active = nn.ModuleDict({"policy": factors}), "policy"
    with torch.no_grad():
        found.weight.normal_(0, 0.05)
        factors.lora_A.normal_(0, 0.05)
        factors.lora_B.normal_(0, 0.02)
        if dora:
            factors.magnitude.copy_(factors.lengths(linear.weight) * (1 + 0.002 * torch.randn(256)))
    if scheme is not None:
        found.on = True
    return found, factors


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_dora_stretches_by_what_it_learned(compiled):
    """Each output channel's gain is that of the merged matrix: bfloat16 has steps of 0.4 to 0.8 % near 1."""
    linear, factors = layer(dora=True)
    x = torch.randn(4096, 256).bfloat16()
    y = (torch.compile(linear) if compiled else linear)(x).double()
    exact = x.double() @ factors.merged(linear.weight).double().T
    gain = ((y * exact).sum(0) / exact.square().sum(0) - 1).abs()
    assert gain.median() < 1e-4 and gain.max() < 5e-4 and linear(x).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shared_weights_are_rounded_with_the_whole_factors(scheme):
    """Under FSDP2 in bfloat16 too the matrix is the one that is stored once the adapter is merged."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    one_process()
    (one, factors), (shared, _) = layer(scheme=scheme), layer(scheme=scheme)
    stored = SCHEMES[scheme].weight(factors.merged(one.weight).bfloat16(), 32)
    policy = MixedPrecisionPolicy(param_dtype=_gathered_in(shared, torch.bfloat16), reduce_dtype=torch.float32)
    fully_shard(shared, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    x = torch.eye(256).bfloat16()
    inputs = x if one.scheme.inputs is None else one.scheme.inputs(x)
    assert torch.equal(shared(x), inputs @ stored.T) and torch.equal(one(x), shared(x))


def test_who_is_gathered_in_its_own_dtype():
    assert _gathered_in(layer()[0], torch.bfloat16) == torch.bfloat16
    assert _gathered_in(layer(dora=True)[0], torch.bfloat16) is None
    mixed, _ = layer(scheme="int4")
    mixed.weight.requires_grad_(True)  # FSDP2 wants one dtype of what trains in a unit
    assert _gathered_in(mixed, torch.bfloat16) == torch.bfloat16
