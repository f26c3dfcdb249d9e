"""Multi-token prediction: its equations by plain loops in float64; saved beside a model that does not know it."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_model import write_model

from ftlib import models
from ftlib.errors import UserError
from ftlib.layers.batch import from_documents
from ftlib.losses.multi_token import multi_token_loss
from ftlib.models import load, mtp, sizes
from ftlib.sections import Context, Loss, Mtp, Sizes

LENGTHS = (9, 2, 1, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def with_modules(folder, depth=2, weight=0.3, seed=3):
    """The model in float64, its modules far from where they begin."""
    model = load.build(folder, torch.float64)
    weights = load.check_weights(model, folder)
    mtp.attach(model, Mtp(depth=depth, weight=weight))
    model.to_empty(device="cpu")
    model.tie()
    load.load_weights(model, weights)
    mtp.fill(model, None, seed, 0.3)
    model.model.use_attention("reference")
    return model


def packed(lengths=LENGTHS, seq_len=20, shared_seed=1, weighted=False):
    dice = np.random.default_rng(shared_seed)
    documents = []
    for n in lengths:
        ids = dice.integers(3, 250, n).astype(np.int32)
        documents.append((ids, np.append(ids[1:], -100).astype(np.int32)))
    documents[0][1][:3] = -100  # a prompt
    if weighted:
        documents = [(*d, (dice.random(len(d[0])) * (d[1] != -100)).astype(np.float32)) for d in documents]
    return from_documents([documents], seq_len, 0, len(lengths)), documents


def rms(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def attention(block, xs, positions, rope):
    """One document, one query at a time: xs, a list of [D]."""
    spec, table = block.self_attn.spec, rope.table(torch.tensor([positions]))
    half, width = table.cos.shape[-1], spec.head_dim

    def turned(vector, t):
        a, b, cos, sin = vector[:half], vector[half:], table.cos[0, t].double(), table.sin[0, t].double()
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    layer, out = block.self_attn, []
    for t in range(len(xs)):
        heads = []
        for h in range(spec.heads):
            kv = h // (spec.heads // spec.kv_heads)
            rows, kv_rows = slice(h * width, (h + 1) * width), slice(kv * width, (kv + 1) * width)
            q = turned(layer.q_proj.weight[rows] @ xs[t], t)
            scores = [q @ turned(layer.k_proj.weight[kv_rows] @ xs[j], j) / math.sqrt(width) for j in range(t + 1)]
            p = torch.stack(scores).softmax(0)
            heads.append(sum(p[j] * (layer.v_proj.weight[kv_rows] @ xs[j]) for j in range(t + 1)))
        out.append(layer.o_proj.weight @ torch.cat(heads))
    return out


def by_loops(model, hidden, documents):
    """lambda / D sum_k sum_i -log P^k_i[t_{i+k+1}], each document by itself, T left to the caller."""
    eps, head, embedding = model.arch.norm_eps, model.lm_head.weight, model.model.embed_tokens.weight
    rope, total, start = model.arch.layers[-1].mixer.rope, 0.0, 0
    for ids, labels, *own in documents:
        h = [hidden[0, start + i] for i in range(len(ids))]
        for k, depth in enumerate(model.mtp, 1):
            # i = 1 … T - k of the paper: the others lack a token to read and a target.
            xs = []
            for i in range(len(ids) - k):
                token = rms(embedding[ids[i + k]], depth.token_norm.weight, eps)
                xs.append(depth.proj.weight @ torch.cat((rms(h[i], depth.hidden_norm.weight, eps), token)))
            block = depth.block
            mixed = attention(block, [rms(x, block.attn_pre.weight, eps) for x in xs], list(range(len(xs))), rope)
            h = []
            for x, y in zip(xs, mixed, strict=True):
                x = x + y
                z = rms(x, block.mlp_pre.weight, eps)
                gate = torch.nn.functional.silu(block.mlp.gate_proj.weight @ z)
                x = x + block.mlp.down_proj.weight @ (gate * (block.mlp.up_proj.weight @ z))
                h.append(rms(x, depth.norm.weight, eps))
            for i, vector in enumerate(h):
                if labels[i + k] != -100:  # which is t_{i+k+1}
                    weight = own[0][i + k].item() if own else 1.0
                    total = total - weight * (head @ vector).log_softmax(0)[labels[i + k]]
        start += len(ids)
    return model.mtp.weight / len(model.mtp) * total


@pytest.mark.parametrize("depth,weighted", [(1, False), (2, False), (2, True)])
def test_loss_and_gradients_are_the_equations(folder, depth, weighted):
    model, (batch, documents) = with_modules(folder, depth), packed(weighted=weighted)
    hidden = model(batch).detach().requires_grad_()
    wanted = by_loops(model, hidden, documents)
    expected = torch.autograd.grad(wanted, [hidden, *model.mtp.parameters()])
    found = multi_token_loss(model, hidden, batch)
    gradients = torch.autograd.grad(found, [hidden, *model.mtp.parameters()])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6) and wanted > 1
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_document_reads_nothing_of_the_next(folder):
    model, (batch, _) = with_modules(folder), packed()
    hidden, before = model(batch).detach(), None
    for token in (7, 8):
        changed = batch.input_ids.clone()
        changed[0, 9:] = token  # everything after the first document
        labels = batch.labels.clone()
        labels[0, 9:] = -100
        other = type(batch)(changed, labels, batch.position_ids, batch.layout)
        found = multi_token_loss(model, hidden, other).item()
        assert before in (None, found)
        before = found


def test_without_modules_nothing_is_added(folder):
    model = models.from_pretrained(folder)
    assert model.mtp is None and multi_token_loss(model, torch.zeros(1), None, Loss()) == 0.0
    mtp.attach(model, Mtp())
    assert model.mtp is None


def test_saved_beside_a_model_that_does_not_know_it(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = with_modules(folder).float()
    models.save_pretrained(model, tmp_path)
    again = models.from_pretrained(tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.logits(ids), model.logits(ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, model.logits(ids), rtol=1e-4, atol=1e-5)
    other = with_modules(folder, seed=9).float()
    mtp.fill(other, tmp_path, 0)
    for a, b in zip(other.mtp.parameters(), model.mtp.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"mtp.depth 2(.|\n)*this run has 1"):
        mtp.fill(with_modules(folder, depth=1), tmp_path, 0)
    longer = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": None, "rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps(longer))
    linked = sizes.write(tmp_path, tmp_path / "out", Sizes(), Context(length=4096), weights=True)
    mtp.fill(with_modules(folder), linked, 0)


def test_weights_are_the_seeds(folder):
    first, again, other = (with_modules(folder, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(*(m.mtp.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b) and (a.ndim == 1 or not torch.equal(a, c))
