"""Rollouts by the real vLLM against our engine: an adapter and all weights, as they are and after they changed."""

from importlib import metadata

import pytest
import torch
from parity.shrink import shrunk

from ftlib.adapters import lora
from ftlib.generation import Engine, SamplingParams
from ftlib.generation.vllm import VERSION, VllmEngine
from ftlib.models import LanguageModel, families, from_pretrained, save_pretrained
from ftlib.sections.rl import Rollout


def installed():
    try:
        return metadata.version("vllm").startswith(VERSION)
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not installed(), reason=f"needs the package vllm, version {VERSION}*"),
]
PROMPTS = [[3 + (7 * i + 5 * j) % 900 for j in range(length)] for i, length in enumerate((1, 16, 33, 5, 100))]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that both programs read."""
    made = shrunk("llama-2-7b", **SIZES, num_attention_heads=4, num_key_value_heads=2) | {"head_dim": 64}
    arch, table = families.read(made)
    model = LanguageModel(arch, table, made)
    model.model.init_weights(0, std=0.08)
    where = tmp_path_factory.mktemp("random") / "model"
    save_pretrained(model, where)
    return where


def change(model, how, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    if how == "all weights":
        model.model.init_weights(seed, std=0.08)
    else:
        with torch.no_grad():
            for _, _, factors in lora.adapted(model):
                factors.lora_B.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize(
    ("how", "dtype", "near"), [("adapter", torch.bfloat16, 0.15), ("all weights", torch.float32, 2e-2)]
)
def test_vllm_draws_what_our_model_gives(folder, how, dtype, near):
    """Its greedy tokens are the likeliest here, or as good as; what it says of its draws is what a trainer computes."""
    model = from_pretrained(folder, device="cuda", dtype=dtype)
    if how == "adapter":
        lora.attach(model, "all-linear", rank=9)
        lora.reset(model, 0)
    rollout = Rollout(engine="vllm", vllm_memory=0.2, vllm_sleep=True, max_batch=16)
    greedy = SamplingParams(24, temperature=0.0, stop_ids=frozenset({5}))
    drawn = SamplingParams(24, temperature=0.7, stop_ids=frozenset({5}), seed=3)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    engine, seen = VllmEngine(model, rollout, longest=256, dtype=name), []
    try:
        for seed in (1, 2):
            change(model, how, seed)
            engine.refresh()
            for params, n in ((greedy, 1), (drawn, 3)):
                groups = engine.generate(PROMPTS, params, n)
                for prompt, one in [(prompt, one) for prompt, own in zip(PROMPTS, groups, strict=True) for one in own]:
                    own, best = scores(model, prompt, one.token_ids, params.temperature or 1.0)
                    assert torch.tensor(one.logprobs).sub(own).abs().max() < near
                    assert params.temperature or best.sub(own).max() < near
                    ended = one.token_ids[-1] == 5
                    assert one.finish_reason == ("stop" if ended else "length") and 5 not in one.token_ids[:-1]
                    assert ended or len(one.token_ids) == 24
            assert all(len({tuple(one.token_ids) for one in group}) > 1 for group in groups)
            ours = Engine(model).generate(PROMPTS, greedy)
            seen.append([one.token_ids for (one,) in engine.generate(PROMPTS, greedy)])
            assert dtype is torch.bfloat16 or seen[-1] == [one.token_ids for (one,) in ours]
            engine.release()
        assert seen[0] != seen[1]
    finally:
        engine.close()


@torch.no_grad()
def scores(model, prompt, ids, temperature):
    """Log-probabilities over all tokens at the temperature, of those drawn and of the likeliest, [n] each."""
    rows = model.logits(torch.tensor([[*prompt, *ids]], device="cuda"))[0, len(prompt) - 1 : -1].float() / temperature
    found = rows.log_softmax(-1).cpu()
    return found[torch.arange(len(ids)), torch.tensor(ids)], found.amax(-1)
