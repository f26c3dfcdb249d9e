"""Experts chosen with a correction (GLM-4.5): what the correction is to a run, and what is read around it."""

import json

import pytest
import torch
from parity.shrink import reference, relative, shrunk
from safetensors.torch import load_file, save_file

from ftlib import models, optim
from ftlib.adapters import lora
from ftlib.errors import UserError
from ftlib.generation import Engine, SamplingParams
from ftlib.generation.remote import RemoteEngine
from ftlib.models import families, initial, load, mtp
from ftlib.parallel import recompute
from ftlib.sections import Memory, Optim
from ftlib.sections.loss import Mtp

X = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(2))
NAME = "e_score_correction_bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = shrunk("glm-4.5-air")
    reference(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def corrections(state) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.endswith(NAME)}


def test_it_keeps_its_precision_in_a_model_of_any_dtype(folder, tmp_path):
    stored = corrections(load_file(folder / "model.safetensors"))
    assert len(stored) == 2 and all(each.dtype is torch.float32 for each in stored.values())
    model = models.from_pretrained(folder, dtype=torch.bfloat16)
    for mine in (model, model.to(torch.float64), model.to(torch.bfloat16), model.cpu()):
        found = corrections(mine.state_dict())
        assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    models.save_pretrained(model, tmp_path)
    written = corrections(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_bf16_chooses_as_transformers_does(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16)
    theirs.set_experts_implementation("eager")
    ours = models.from_pretrained(folder, dtype=torch.bfloat16)
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for block, other in zip(ours.model.layers[1:], theirs.model.layers[1:], strict=True):
        with torch.no_grad():
            chosen, weights, _ = block.mlp.gate(x)
            _, their_weights, their_choice = other.mlp.gate(x)
        order, their_order = chosen.argsort(-1), their_choice.argsort(-1)
        assert torch.equal(chosen.gather(1, order), their_choice.gather(1, their_order))
        assert torch.equal(weights.gather(1, order), their_weights.gather(1, their_order).bfloat16())


def test_it_decides_who_is_chosen_and_training_leaves_it(folder):
    model = models.from_pretrained(folder).train()
    router = model.model.layers[1].mlp.gate
    before = router.e_score_correction_bias.clone()
    optimizer = optim.build(model, Optim(lr=1e-2))
    model.logits(X).square().mean().backward()
    optim.step(optimizer, 1.0)
    assert torch.equal(router.e_score_correction_bias, before)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.e_score_correction_bias[11] = 5.0
        assert (router(x)[0] == 11).any(1).all()
        assert router(x)[1].sum(1).allclose(torch.ones(50)), "the weights are those of the scores alone"


def test_fresh_weights_have_none():
    config = shrunk("glm-4.5-air")
    with torch.device("meta"):
        model = models.LanguageModel(*families.read(config), config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    initial.init_weights(model, 0)
    assert all(not tensor.any() for tensor in corrections(model.state_dict()).values())
    assert model.logits(X).isfinite().all()


@pytest.mark.parametrize("copy", ["merged", "gathered", "remote"])
def test_copies_to_draw_from_have_it(copy, folder):
    model = models.from_pretrained(folder)
    lora.attach(model, ("q_proj", "shared_experts.up_proj", "experts.down_proj"), rank=2)
    lora.reset(model, 0)
    for _, _, factors in lora.adapted(model):
        torch.nn.init.normal_(factors.lora_B, 0, 0.1, torch.Generator().manual_seed(3))
    prompts, params = [X[0, :5].tolist(), X[1, :11].tolist()], SamplingParams(20, temperature=0)
    wanted = [[c.token_ids for c in each] for each in Engine(model).generate(prompts, params)]
    made = RemoteEngine(model, torch.device("cpu"), 2) if copy == "remote" else Engine(model, adapter=copy)
    try:
        made.load() if copy == "remote" else made.refresh()
        assert [[c.token_ids for c in each] for each in made.generate(prompts, params)] == wanted
    finally:
        made.close() if copy == "remote" else None


@pytest.mark.parametrize("saved", [False, True])
def test_modules_for_tokens_ahead_begin_without_one(saved, folder, tmp_path):
    """Their blocks are like the last one, whatever the memory held that they were made in."""
    model = load.build(folder, torch.float32)
    mtp.attach(model, Mtp(depth=1))
    model.to_empty(device="cpu")
    for _ in range(1 + saved):
        for tensor in (*model.mtp.parameters(), *model.mtp.buffers()):
            tensor.detach().fill_(float("nan"))
        mtp.fill(model, tmp_path, 0)
        mtp.save(model, tmp_path)
        assert all(tensor.isfinite().all() for tensor in model.mtp.state_dict().values())
    assert not any(tensor.any() for tensor in corrections(model.mtp.state_dict()).values())


@pytest.mark.parametrize("kept", ["full", "selective", "none"])
def test_compiled_blocks_give_the_same(folder, kept, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    found = []
    for memory in (Memory(recompute="none", compile=False), Memory(recompute=kept, compile=True)):
        model = models.from_pretrained(folder).train()
        recompute.use(model, memory, torch.device("cpu"))
        model.logits(X).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert max(relative(found[1][name], grad) for name, grad in found[0].items()) <= 1e-5


def test_layers_that_predict_further_tokens_are_left_out(folder, tmp_path):
    stored, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    last = {"model.layers.3.eh_proj.weight": torch.ones(64, 128), "model.layers.3.mlp.gate.weight": torch.ones(12, 64)}
    (tmp_path / "config.json").write_text(config)
    save_file(stored | last, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = models.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.logits(X), models.from_pretrained(folder).logits(X))
    models.save_pretrained(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()
    save_file(stored | {"model.layers.4.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for: model\.layers\.4\.eh_proj\.weight"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 5, "topk_group": 5},
        {"n_group": 12, "topk_group": 12},
        {"n_group": 6, "topk_group": 1},
        {"n_group": 6, "topk_group": 7},
    ],
)
def test_groups_that_do_not_fit_are_refused(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shrunk("glm-4.5-air") | changes))
    with pytest.raises(UserError, match=r"n_group \d+ and topk_group \d+ do not fit 12 experts, 4 for a token"):
        load.build(tmp_path, torch.float32)
