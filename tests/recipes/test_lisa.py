"""Layers that sleep (LISA): which train when, what is kept of the others, and runs that go on."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_model import ROOT, losses, steps, train, write_config, write_model

from ftlib import build, config, models, optim, plugins, preflight
from ftlib.checkpoint import tensors
from ftlib.errors import UserError
from ftlib.optim import lisa
from ftlib.sections import Lisa, Optim

SETTINGS = {
    "schedule": {"name": "constant", "warmup_steps": 0},
    "checkpoint": {"every": 3},
    "optim": {"lr": 1e-3},
    "lisa": {"layers": 1, "every": 2},
    "steps": 8,
}


@pytest.fixture(scope="module")
def deep(tiny, tmp_path_factory):
    """A model of four layers, and a config of eight steps that draws one of them every two."""
    folder = tmp_path_factory.mktemp("lisa")
    model = write_model(folder / "model", num_hidden_layers=4)
    return SimpleNamespace(
        model=model, config=write_config(folder / "c.yaml", model, tiny.rows, tiny.held_out, **SETTINGS)
    )


def test_each_set_of_layers_is_as_likely_and_a_function_of_seed_and_step():
    section, drawn = Lisa(layers=2, every=5), Counter()
    for period in range(3000):
        sets = {frozenset(lisa.awake(section, 1, period * 5 + step, 4)) for step in range(1, 6)}
        assert len(sets) == 1, "one set for a whole period"
        drawn[sets.pop()] += 1
    assert set(drawn) == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}
    assert all(abs(count - 500) < 80 for count in drawn.values())
    assert [lisa.awake(section, 1, s, 4) for s in (1, 6, 11)] != [lisa.awake(section, 2, s, 4) for s in (1, 6, 11)]


def test_only_what_is_awake_moves_as_if_the_rest_were_constant(deep):
    """Against AdamW by hand over the chosen layers, whose moments begin anew when they wake."""
    ours, by_hand = (models.from_pretrained(deep.model).double().train() for _ in range(2))
    section = Lisa(layers=1, every=2)
    lisa.attach(ours, SimpleNamespace(lisa=section, seed=5))
    optimizer = optim.build(ours, Optim(lr=1e-2, betas=(0.9, 0.95), eps=1e-8))
    moments: dict[str, list] = {}
    for step in range(1, 7):
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(step))
        lisa.at(step, ours, optimizer)
        ours.logits(ids).square().mean().backward()
        names = {name for name, p in ours.named_parameters() if p.grad is not None}
        optim.step(optimizer, None)

        chosen = lisa.awake(section, 5, step, 4)
        trained = {
            name: p for name, p in by_hand.named_parameters()
            if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) in chosen
        }  # fmt: skip
        assert names == set(trained) and len(chosen) == 1
        assert {id(p) for p in optimizer.state} == {id(p) for n, p in ours.named_parameters() if n in trained}
        moments = {name: kept for name, kept in moments.items() if name in trained}
        gradients = torch.autograd.grad(by_hand.logits(ids).square().mean(), list(trained.values()))
        for (name, p), g in zip(trained.items(), gradients, strict=True):
            m, v, t = moments.get(name, [0.0, 0.0, 0])
            m, v, t = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g, t + 1
            moments[name] = [m, v, t]
            p.data -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    for (name, a), b in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


def test_a_checkpoint_of_another_period_can_be_read(deep, tmp_path):
    """As going back to one, or to the best one, does in the middle of a run."""
    model, section = models.from_pretrained(deep.model).train(), Lisa(layers=1, every=1)
    lisa.attach(model, SimpleNamespace(lisa=section, seed=0))
    first = lisa.awake(section, 0, 1, 4)
    other = next(step for step in range(2, 99) if lisa.awake(section, 0, step, 4) != first)
    optimizer = optim.build(model, Optim(lr=1e-2))
    for step in (1, other):
        lisa.at(step, model, optimizer)
        model.logits(torch.arange(5, 25)[None]).square().mean().backward()
        optim.step(optimizer, None)
        if step == 1:
            slots, numbers = tensors.optimizer_state(model, [optimizer])
            saved = {name: t.clone() for name, t in (tensors.model_tensors(model) | slots).items()}
            tensors.write(tmp_path, saved, 1)
    wanted = tensors.targets(tmp_path, model, [optimizer], numbers)
    tensors.fill(tmp_path, wanted, model, [optimizer], numbers)
    assert wanted.keys() == saved.keys() and all(torch.equal(wanted[name], saved[name]) for name in saved)


def test_on_and_off_and_on_again_where_it_stopped(deep, tmp_path):
    """Stopped after step 5, inside a period: what has slept since is in the checkpoint too."""
    run = lambda name, *words: train("full_sft", "--config", deep.config, f"output_dir={tmp_path}/{name}", *words)  # noqa: E731
    whole, off = run("whole"), run("off", "lisa.layers=0")
    assert steps(whole)[0] == steps(off)[0] and losses(whole)[1:] != losses(off)[1:]
    assert whole[-1]["eval_loss"] < whole[0]["eval_loss"]
    run("part", "steps=5")
    again = run("part")
    assert losses(again) == losses(whole) and again[-1]["eval_loss"] == whole[-1]["eval_loss"]
    before, after = models.from_pretrained(deep.model), models.from_pretrained(tmp_path / "whole" / "final")
    ever = set().union(*(lisa.awake(Lisa(**SETTINGS["lisa"]), 0, step, 4) for step in range(1, 9)))
    moved = {
        i for i in range(4)
        if not torch.equal(before.model.layers[i].mlp.up_proj.weight, after.model.layers[i].mlp.up_proj.weight)
    }  # fmt: skip
    assert moved == ever and len(ever) > 1
    best = run("best", "checkpoint.keep_best=true", "eval.every=3")  # ends by reading a checkpoint of another period
    assert losses(best) == losses(whole)


@pytest.mark.slow
def test_compiled_blocks_wake_and_sleep(deep, tmp_path):
    """Last result (2026-11-22): passed."""
    words = ("--config", deep.config, "steps=8")
    plain = train("full_sft", *words, f"output_dir={tmp_path}/plain")
    compiled = train("full_sft", *words, f"output_dir={tmp_path}/compiled", "memory.compile=true")
    assert steps(compiled) == pytest.approx(steps(plain), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["lisa.layers=4"], r"lisa\.layers"),
        (["parallel.dp_shard=2", "batch.micro_rows=2"], "parallel: shards"),
        (["optim.name=schedule_free", "schedule.name=constant"], "average is state"),
        (['train.freeze=["norm"]'], "chosen already"),
    ],
)
def test_what_it_does_not_go_with_is_refused(deep, words, named):
    recipe = plugins.load_file(ROOT / "recipes" / "full_sft.py")
    cfg = config.load(recipe.Config, ["--config", str(deep.config), *words])
    with pytest.raises(UserError, match=named):
        build.check(cfg, 2 if "parallel" in words[0] else 1)


def test_the_plan_counts_what_is_awake(deep):
    recipe = plugins.load_file(ROOT / "recipes" / "full_sft.py")
    least = {}
    for layers in (0, 1):
        cfg = config.load(recipe.Config, ["--config", str(deep.config), f"lisa.layers={layers}"])
        least[layers] = preflight.need(build.check_model(cfg), cfg, 1)
    assert least[1].training < 0.7 * least[0].training and least[1].final == least[0].final
