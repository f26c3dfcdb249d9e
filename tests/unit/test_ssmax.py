"""Scalable softmax against its formula, in every layout that attention has, and in a model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import shrunk
from tiny_model import write_model

from ftlib import models
from ftlib.errors import UserError
from ftlib.generation import Engine, ReferenceEngine, SamplingParams
from ftlib.layers.attention import Attention, Attn
from ftlib.layers.batch import Batch, Layout
from ftlib.layers.rope import LogKeys, Rope
from ftlib.models import families, ssmax
from ftlib.models.initial import init_weights
from ftlib.parallel import check as mesh

HEADS, KV, D, DIM = 4, 2, 8, 12
DOCUMENTS = ((0, 7), (7, 8), (8, 13))


def layer(window=None):
    spec = Attn(heads=HEADS, kv_heads=KV, head_dim=D, rope=Rope(dim=D, query_scale=LogKeys()), window=window, ssmax=0.4)
    made = Attention(spec, DIM, 1e-6, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def by_formula(made, x, window):
    """n^(s z_i) / sum_j n^(s z_j) for one query of one head at a time; documents by themselves, positions from 0."""
    out = torch.zeros(x.shape[1], HEADS * D, dtype=torch.float64)
    for start, stop in DOCUMENTS:
        own = x[0, start:stop]
        turns = made.spec.rope.table(torch.arange(stop - start)[None])
        cos, sin = turns.cos[0].double(), turns.sin[0].double()

        def turned(vectors, cos=cos, sin=sin):
            a, b = vectors[:, : D // 2], vectors[:, D // 2 :]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        for h in range(HEADS):
            kv = h * KV // HEADS
            q = turned(own @ made.q_proj.weight[h * D : (h + 1) * D].T)
            k = turned(own @ made.k_proj.weight[kv * D : (kv + 1) * D].T)
            v = own @ made.v_proj.weight[kv * D : (kv + 1) * D].T
            for t in range(stop - start):
                first = 0 if window is None else max(0, t - window + 1)
                n = t + 1 - first
                z = [(q[t] @ k[j]).item() / math.sqrt(D) for j in range(first, t + 1)]
                powers = [n ** (made.ssmax[h].item() * each) for each in z]
                mixed = sum(p / sum(powers) * v[first + j] for j, p in enumerate(powers))
                out[start + t, h * D : (h + 1) * D] = mixed
    return out @ made.o_proj.weight.T


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_attention_is_the_formula(window, backend):
    made, x = layer(window), torch.randn(1, 13, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made.backend = backend
    positions = torch.cat([torch.arange(stop - start) for start, stop in DOCUMENTS])[None]
    layout = Layout.packed(torch.tensor([0, 7, 8, 13], dtype=torch.int32), 13, (1, 13))
    layout.prepare(backend, {window})
    found = made(x, made.spec.rope.table(positions), layout)[0]
    # Angles and log n are float32, whatever x is.
    torch.testing.assert_close(found, by_formula(made, x, window), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert made.ssmax.grad.abs().min() > 0, "every head learns its own"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with scalable softmax, its factors apart from each other."""
    folder = tmp_path_factory.mktemp("ssmax")
    plain = models.from_pretrained(write_model(folder / "plain"))
    config = ssmax.configured(plain.config, 0.168)
    arch, table = families.read(config)
    made = models.LanguageModel(arch, table, config)
    missing, unexpected = made.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("self_attn.ssmax") for name in missing)
    with torch.no_grad():
        for i, block in enumerate(made.model.layers):
            block.self_attn.ssmax.copy_(torch.linspace(0.1, 0.9, arch.layers[0].mixer.heads) + i)
    made.source = plain.source
    return made.eval()


def test_saved_and_read_back_by_us_and_refused_by_others(model, tmp_path):
    from transformers import AutoModelForCausalLM

    models.save_pretrained(model, tmp_path)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(models.from_pretrained(tmp_path).logits(ids), model.logits(ids))
    with pytest.raises(ValueError, match="llama_ssmax"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[ssmax.START]
    with pytest.raises(UserError, match=ssmax.START):
        families.read(config)


def test_generated_tokens_are_those_of_whole_forwards(model):
    prompts, wanted = [list(range(5, 12)), list(range(30, 33))], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    for engine in (ReferenceEngine(model), Engine(model)):
        found = engine.generate(prompts, SamplingParams(max_new_tokens=8, temperature=0))
        assert [group[0].token_ids for group in found] == wanted


def test_one_document_of_many_is_one_alone(model):
    """Packed documents count their own keys."""
    ids = torch.arange(5, 25)[None]
    ends = torch.tensor([0, 6, 20], dtype=torch.int32)
    positions = torch.cat((torch.arange(6), torch.arange(14)))[None]
    batch = Batch(ids, torch.full_like(ids, -100), positions, Layout.packed(ends, 20, (1, 20)), 0, 20)
    with torch.no_grad():
        packed = model.head(model(batch))
        torch.testing.assert_close(packed[:, 6:], model.logits(ids[:, 6:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [("smollm3-3b", "without rope"), ("gemma-2-2b", "capped"), ("gpt-oss-20b", "sinks"), ("ministral-3-8b", "grow")],
)
def test_where_the_factor_is_not_the_querys_it_is_refused(name, words):
    config = shrunk(name)
    config = config.get("text_config", config)
    with pytest.raises(UserError, match=words):
        families.read(ssmax.configured(config, 0.168))


def test_a_fresh_model_begins_where_the_config_says(model):
    made = models.LanguageModel(model.arch, model.table, model.config)
    init_weights(made, 0)
    factors = torch.stack([block.self_attn.ssmax for block in made.model.layers])
    assert torch.equal(factors, torch.full_like(factors, 0.168))


def test_diffusion_looks_at_more_keys_than_a_position_tells(model):
    rows = {"data": SimpleNamespace(seq_len=8), "memory": SimpleNamespace(tiled_mlp=0)}
    mesh.check(model, SimpleNamespace(**rows), 1, 1)
    with pytest.raises(UserError, match="both ways"):
        mesh.check(model, SimpleNamespace(**rows, diffusion=None), 1, 1)
