"""Norms and rotations where a shrunk model's ordinary inputs do not tell formulas apart: tiny and huge channels,
rounding to bfloat16, the edges of a scaling's band, and documents as long as the original range."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ftlib.layers.norms import RMSNorm
from ftlib.layers.rope import Llama3Scaling, LongScaling, QueryScale, Rope, YarnScaling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize(("centered", "theirs"), [(False, LlamaRMSNorm), (True, Gemma3RMSNorm)], ids=["llama", "gemma"])
def test_a_norm_s_rounding_is_the_model_s(centered, theirs, eps, size, dtype):
    """To the bit in half precision: where the weight is multiplied, before rounding or behind it, is the model's."""
    g = torch.Generator().manual_seed(0)
    x, weight = size * torch.randn(50, 32, generator=g, dtype=torch.float64), torch.randn(32, generator=g)
    norm, other = RMSNorm(32, eps, centered), theirs(32, eps=eps)
    for module in (norm, other):
        module.weight.data = weight.to(dtype)
    found, wide = norm(x.to(dtype)), x.to(dtype).double()
    assert found.dtype == dtype
    factor = (weight.to(dtype).double() + 1) if centered else weight.to(dtype).double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * factor
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (found.double() - exact).abs().max() <= limit * exact.abs().max()
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found, other(x.to(dtype)))


def frequencies(rope, **lengths):
    """Of a rope, from the angles at position 1."""
    turns = rope.table(torch.tensor([[1]]), **lengths)
    return torch.atan2(turns.sin, turns.cos)[0, 0], (turns.sin.square() + turns.cos.square()).sqrt()[0, 0]


def theirs(theta, **parameters):
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, max_position_embeddings=131_072)
    config.rope_parameters = {"rope_theta": theta, **parameters}
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("theta", "original"), [(10_000.0, 4096), (100.0, 4096), (500_000.0, 32), (1e6, 32_768)], ids=str
)
def test_yarn_s_band_is_that_of_transformers(theta, original, truncate):
    """Whole channels or not; edges beyond the last channel, and before the first."""
    more = {"factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": truncate}
    wanted, gain = theirs(theta, rope_type="yarn", original_max_position_embeddings=original, **more)
    scaling = YarnScaling(**more, theta=theta, original_max_positions=original, gain=gain)
    found, length = frequencies(Rope(dim=32, theta=theta, scaling=scaling))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(length, torch.full_like(length, gain))


@pytest.mark.parametrize(("theta", "original"), [(10_000.0, 8192), (500_000.0, 64), (100.0, 100_000)], ids=str)
def test_llama_3_s_band_is_that_of_transformers(theta, original):
    more = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wanted, _ = theirs(theta, rope_type="llama3", original_max_position_embeddings=original, **more)
    found, _ = frequencies(Rope(dim=32, theta=theta, scaling=Llama3Scaling(**more, original_max_positions=original)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_each_document_is_turned_as_its_own_length_says():
    """One as long as the original range has the factors for short ones still, also beside a longer one."""
    scaling = LongScaling(short=(1.0, 2.0), long=(4.0, 8.0), original_max_positions=16, gain=1.25)
    rope = Rope(dim=4, theta=100.0, scaling=scaling)
    assert rope.needs_lengths
    turns = rope.table(torch.full((1, 4), 3), torch.tensor([[15, 16, 17, 1]]))
    plain = torch.tensor([3.0, 0.3])
    for at, factors in enumerate(((1.0, 2.0), (1.0, 2.0), (4.0, 8.0), (1.0, 2.0))):
        angle = plain / torch.tensor(factors)
        torch.testing.assert_close(turns.cos[0, at], 1.25 * angle.cos())
        torch.testing.assert_close(turns.sin[0, at], 1.25 * angle.sin())


def test_queries_grow_in_steps_of_the_original_range():
    rope = Rope(dim=2, query_scale=QueryScale(beta=0.1, original_max_positions=8192))
    found = rope.table(torch.tensor([[0, 8191, 8192, 16_383, 3 * 8192 + 5]])).query
    wanted = [1.0, 1.0, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(4)]
    assert found[0].tolist() == pytest.approx(wanted, rel=1e-6)


def test_angles_are_exact_at_late_positions():
    at = torch.tensor([[0, 1, 4095, 131_071]])
    turns = Rope(dim=8, theta=500_000.0).table(at)
    angle = at[0].double()[:, None] * 500_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert turns.cos.dtype == torch.float32
    assert (turns.cos[0] - angle.cos()).abs().max() < 0.01 and (turns.sin[0] - angle.sin()).abs().max() < 0.01
