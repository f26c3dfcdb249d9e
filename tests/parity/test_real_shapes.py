"""What small shapes cannot show: frequencies of the real ropes, and activations large enough to be clamped."""

import json

import pytest
import torch
from parity.shrink import published

from ftlib.layers.moe import Experts, Moe
from ftlib.models import families


@pytest.mark.parametrize("name", ["gpt-oss-20b", "ministral-3-8b", "llama-3.1-8b", "phi-4-mini"])
def test_frequencies(name):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = published(name)
    config = config.get("text_config", config)
    fields = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in ("model_type", "quantization_config")}
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    expected, gain = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    rope = families.read(config)[0].layers[0].mixer.rope
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2).float() / rope.dim)
    assert torch.allclose(rope.scaling.apply(plain), expected, rtol=1e-5, atol=0)
    assert rope.scaling.gain == pytest.approx(gain)


def test_frequencies_of_a_rope_with_an_alpha():
    from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as hunyuan

    config = published("hunyuan-1.8b")
    rope = families.read(config)[0].layers[0].mixer.rope
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    theirs = hunyuan.HunYuanDenseV1RotaryEmbedding(hunyuan.HunYuanDenseV1Config(**fields))
    ours = rope.table(torch.tensor([[0, 1, 200_000]]))
    cos, sin = theirs(torch.zeros(1), torch.tensor([[0, 1, 200_000]]))
    assert torch.equal(ours.cos, cos[..., :64]) and torch.equal(ours.sin, sin[..., :64])


def test_clamped_activation():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    theirs = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=8, num_local_experts=2))
    ours = Experts(Moe(hidden=8, experts=2, top_k=1, clamp=7.0, interleaved=True), 4)
    x = torch.linspace(-20, 20, 48).view(3, 16)
    assert torch.allclose(ours.activate(x), theirs._apply_gate(x))
