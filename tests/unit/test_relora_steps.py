"""ReLoRA against a plain script of the paper; what a merge leaves as it was, and going back to before one."""

import math
import zlib
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import relative
from tiny_model import probe, write_model
from torch import nn

from ftlib import models, optim
from ftlib.adapters import lora, merge, relora
from ftlib.adapters.fuse import fuse
from ftlib.checkpoint import tensors
from ftlib.optim.schedule import learning_rate
from ftlib.quant import qat
from ftlib.sections import Lora, Model, Optim, Qat, Relora, Schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def adapted(folder, dtype=torch.float64):
    """A model with an adapter that does something, and `relora` of every three steps."""
    model = models.from_pretrained(folder, dtype=dtype).train()
    wide = dtype if dtype == torch.float64 else torch.float32
    lora.attach_section(model, Lora(rank=2), dtype=wide)
    lora.reset(model, 5)
    section = Relora(every=3, warmup_steps=2)
    relora.attach(model, SimpleNamespace(relora=section, seed=5, model=Model(path="."), optim=Optim(), steps=9))
    return model


class Logits(nn.Module):
    """What `functional_call` can call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.logits(ids)


def test_steps_are_those_of_a_plain_script(folder):
    """Adam by hand on W + s B A, merged, drawn, pruned and warmed up again as the paper says, in float64."""
    model, section = adapted(folder), Relora(every=3, warmup_steps=2, keep=0.1)
    model.relora.section = section
    schedule, last = Schedule(warmup_steps=0, min_ratio=0.1), 8
    optimizer = optim.build(model, Optim(betas=(0.9, 0.95), eps=1e-4))  # a large eps: no rounding is made a step
    plain = models.from_pretrained(folder).double()
    layers = [name for name, _, _ in lora.adapted(model)]
    weights, moments, factors = dict(plain.named_parameters()), {}, {}
    for p in weights.values():
        p.requires_grad_(False)

    def draw(name, text):
        out, inside = weights[f"{name}.weight"].shape
        dice = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        a = nn.init.kaiming_uniform_(torch.empty(2, inside), a=math.sqrt(5), generator=dice).double()
        factors[name] = [a.requires_grad_(), torch.zeros(out, 2, dtype=torch.float64, requires_grad=True)]

    def pruned(x):
        return torch.where(x.abs() > torch.quantile(x.abs(), 0.9), x, 0.0)

    for name in layers:
        draw(name, f"5:{name}")
    for step in range(1, last + 1):
        ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(step))
        relora.at(step, model, optimizer)
        optim.set_rate(optimizer, learning_rate(schedule, 1e-2, step, last, section))
        model.logits(ids).square().mean().backward()
        optim.step(optimizer, None)

        if step in (4, 7):
            for name in layers:
                a, b = factors[name]
                weights[f"{name}.weight"] += 16.0 * (b @ a).detach()
                draw(name, f"5:{name}:{step // 3}")
                for i in (0, 1):
                    first, second = (pruned(x) for x in moments[name, i])
                    moments[name, i] = [torch.where(second > 0, first, 0.0), second]
        rate = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / last)) / 2)
        rate *= {4: 0.5, 7: 0.5}.get(step, 1.0)
        used = {f"{name}.weight": weights[f"{name}.weight"] + 16.0 * b @ a for name, (a, b) in factors.items()}
        found = torch.func.functional_call(Logits(plain), {f"model.{key}": w for key, w in used.items()}, (ids,))
        every = [part for name in layers for part in factors[name]]
        gradients = torch.autograd.grad(found.square().mean(), every)
        for number, g in enumerate(gradients):
            key = layers[number // 2], number % 2
            m, v = moments.get(key, [torch.zeros_like(g)] * 2)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            moments[key] = [m, v]
            every[number].data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-4)
    for name, linear, mine in lora.adapted(model):
        torch.testing.assert_close(linear.weight, weights[f"{name}.weight"], rtol=1e-9, atol=1e-11, msg=name)
        for ours, theirs in zip((mine.lora_A, mine.lora_B), factors[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_the_largest_moments_stay():
    generator = torch.Generator().manual_seed(0)
    for keep, shape in ((0.01, (40, 50)), (0.25, (7, 9)), (0.0, (4, 4))):
        m, v = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        first, second = (torch.where(x.abs() > torch.quantile(x.abs(), 1 - keep), x, 0.0) for x in (m, v))
        relora.prune(m, v, keep)
        assert torch.equal(v, second) and int((v != 0).sum()) == math.ceil(keep * (v.numel() - 1)), keep
        assert torch.equal(m, torch.where(second > 0, first, 0.0)), "none that would be divided by nothing"


def test_the_rate_comes_back_from_nothing_after_each_merge():
    """The cosine of the whole run, with teeth (the paper's figure 2)."""
    schedule, section = Schedule(warmup_steps=5, min_ratio=0.1), Relora(every=20, warmup_steps=4)
    plain = [learning_rate(schedule, 1.0, step, 100) for step in range(1, 101)]
    found = [learning_rate(schedule, 1.0, step, 100, section) for step in range(1, 101)]
    teeth = {20 * k + i: i / 4 for k in range(1, 5) for i in range(1, 5)}
    assert found == [rate * teeth.get(step, 1.0) for step, rate in enumerate(plain, 1)]
    assert found == pytest.approx(plain) if not teeth else min(found) > 0


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [
        ("llama-3.2-1b", torch.float32, 1e-5),
        ("fused llama-3.2-1b", torch.float32, 1e-5),  # weights and factors in one buffer
        ("llama-3.2-1b", torch.bfloat16, 2e-2),  # the sum of W and B A is rounded to 8 bits
        ("gpt-oss-20b", torch.float32, 1e-5),
        ("qwen3-30b-a3b", torch.float32, 1e-5),
    ],
)
def test_a_merge_leaves_the_function_as_it_was(name, dtype, limit, tmp_path):
    model = adapted(write_model(tmp_path, name.removeprefix("fused ")), dtype)
    assert not name.startswith("fused") or fuse(model) > 0
    generator, optimizer = torch.Generator().manual_seed(3), optim.build(model, Optim())
    for _, _, factors in lora.adapted(model):
        factors.lora_B.data = 0.02 * torch.randn(factors.lora_B.shape, generator=generator)
    with lora.use(model, None):
        base = probe(model.logits)
    before = probe(model.logits)
    a = next(iter(lora.adapted(model)))[2].lora_A.clone()
    relora.at(3, model, optimizer)
    assert not relora.changed(model) and torch.equal(probe(model.logits), before), "not yet"
    relora.at(4, model, optimizer)
    assert relative(probe(model.logits), before) <= limit < relative(base, before)
    for _, linear, factors in lora.adapted(model):
        assert not factors.lora_B.any() and linear.weight.dtype == dtype
    assert not torch.equal(next(iter(lora.adapted(model)))[2].lora_A, a), "drawn again, not the same"


def test_a_merge_under_rounding_changes_no_bit(folder):
    """What `qat` rounds is the merged matrix already."""
    model = models.from_pretrained(folder, dtype=torch.bfloat16)
    qat.attach(model, Qat(scheme="fp8"), "qat")
    lora.attach(model, "all-linear", rank=2)
    lora.reset(model, 0)
    generator = torch.Generator().manual_seed(3)
    for _, _, factors in lora.adapted(model):
        factors.lora_B.data = 0.02 * torch.randn(factors.lora_B.shape, generator=generator)
    qat.switch(model, True)
    before = probe(model.logits)
    merge.fold(model)
    lora.reset(model, 1)
    assert torch.equal(probe(model.logits), before)


def test_going_back_to_before_the_first_merge_gives_the_old_base(folder, tmp_path):
    """As `spike: rollback` and `keep_best` do: that checkpoint has no base, so its files are read again."""
    model = adapted(folder, torch.float32)
    model.source = folder
    optimizer, start = optim.build(model, Optim(lr=1e-2)), probe(model.logits)
    saved = {}
    for step in range(1, 6):
        relora.at(step, model, optimizer)
        model.logits(torch.arange(5, 25)[None]).square().mean().backward()
        optim.step(optimizer, None)
        if step in (2, 4):
            slots, numbers = tensors.optimizer_state(model, [optimizer])
            (place := tmp_path / str(step)).mkdir()
            tensors.write(place, {k: t.clone() for k, t in (tensors.model_tensors(model) | slots).items()}, 1)
            saved[step] = place, numbers, probe(model.logits)
    assert relative(start, saved[2][2]) > 1e-3
    for step in (2, 4, 2):
        place, numbers, logits = saved[step]
        wanted = tensors.targets(place, model, [optimizer], numbers)
        tensors.fill(place, wanted, model, [optimizer], numbers)
        assert torch.equal(probe(model.logits), logits) and model.relora.merged == (step > 3)


def test_sizes_that_mean_nothing_are_refused():
    for wrong, named in (({"every": 50}, "fewer than the 50"), ({"keep": 1.0}, "keep"), ({"every": -1}, "negative")):
        with pytest.raises(ValueError, match=named):
            Relora(**wrong)
