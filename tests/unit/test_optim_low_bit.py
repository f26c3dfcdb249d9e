"""AdamW with moments in few bits, stochastic rounding, and parameters that move in backward."""

import pytest
import torch
from faults.tiny_training import Loader, one_process
from tiny_model import ROOT
from torch import nn

from ftlib import build, config, models, optim, plugins, tokenizers
from ftlib.checkpoint import Saver, State
from ftlib.errors import UserError
from ftlib.models import hub
from ftlib.optim import adamw, lowbit
from ftlib.optim.in_backward import ALONE
from ftlib.optim.rounding import noise, to_bfloat16
from ftlib.sections import Checkpoint, Optim

CPU = torch.device("cpu")
STATES = ("fp32", "bf16", "int8", "fp8", "int4")
ERRORS = {"int8": (0.0071, 0.0036), "fp8": (0.036, 0.036), "int4": (0.12, 0.063)}  # of a block's largest, by moment


class Net(nn.Module):
    """A matrix that is worth low-bit states, whose rows are no power of two, a small one and a vector."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.large, self.small = nn.Linear(448, 10), nn.Linear(10, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 10)
        self.to(dtype)

    def forward(self, x):
        return self.small(torch.tanh(self.large(x)))


def fill(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        size = torch.logspace(-3, 0, p.shape[-1])  # entries of one block that differ a thousandfold
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def moved(dtype=torch.float32, steps=6, **settings):
    """The model and optimizer after some steps on made-up gradients."""
    model = Net(dtype)
    optimizer = optim.build(model, Optim(lr=1e-2, weight_decay=0.1, **settings))
    for step in range(steps):
        fill(model, step)
        optim.step(optimizer, None)
    return model, optimizer


def test_float32_states_are_torch_adamw():
    ours, theirs = moved(states="fp32")[0], moved()[0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_in_eight_bits_moments_are_where_dettmers_puts_them():
    """torchao's copy of the published map; ours has the least positive number in place of 0 for the second moment."""
    theirs = pytest.importorskip("torchao.optim.quant_utils").create_dynamic_map
    for kind, signed, arguments in (
        ("int8", True, (True, 7, 8)),
        ("int8", False, (False, 7, 8)),
        ("int4", True, (True, 3, 4)),
    ):
        ours, published = lowbit.book(kind, signed, CPU), torch.tensor(theirs(*arguments))
        if not signed:
            assert published[0] == 0 and 0 < ours[0] < published[1]
            ours, published = ours[1:], published[1:]
        torch.testing.assert_close(ours, published, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", lowbit.KINDS)
def test_codes_are_the_nearest_numbers(kind):
    generator = torch.Generator().manual_seed(0)
    for signed, most in zip((True, False), ERRORS[kind], strict=True):
        x = torch.randn(200, 64, generator=generator) * torch.logspace(-6, 6, 200)[:, None]
        x = x if signed else x.square()
        x[3] = 0
        numbers = lowbit.book(kind, signed, CPU)
        codes, scale = lowbit.encode(x, kind, signed, numbers)
        found = lowbit.decode(codes, scale, kind, numbers)
        assert ((found - x).abs().amax(-1) <= most * x.abs().amax(-1)).all()
        assert (found[3] == 0).all() and (signed or (found[x > 0] > 0).all())
        if kind != "fp8":
            wanted = ((x[:3] / scale[:3, None])[..., None] - numbers).abs().amin(-1)
            torch.testing.assert_close((found - x)[:3].abs() / scale[:3, None], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", lowbit.KINDS)
def test_the_recurrence_with_moments_through_few_bits(kind):
    """AdamW written down again; between steps both moments of the large matrix go through their codes by blocks."""
    model, optimizer = moved(states=kind)
    other, moments = Net(), {}
    block = {"int8": 224, "fp8": 224, "int4": 112}[kind]  # the largest even divisors of 448 up to 256 and 128
    with torch.no_grad():
        for step in range(1, 7):
            fill(other, step - 1)
            for name, p in other.named_parameters():
                m, v = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
                m, v = 0.9 * m + 0.1 * p.grad, 0.95 * v + 0.05 * p.grad**2
                p.mul_(1 - 1e-2 * (0.1 if p.ndim > 1 else 0))
                p -= 1e-2 * m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
                if name == "large.weight":
                    m, v = (rounded(x, kind, signed, block) for x, signed in ((m, True), (v, False)))
                moments[name] = m, v
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-4 and (a - b).abs().mean() < 1e-6  # a code beside a tie may differ
    held = optimizer.state[model.large.weight]
    assert {name for name, value in held.items() if name != "step" and value.dtype == torch.uint8} == {
        f"exp_avg_{kind}", f"exp_avg_sq_{kind}"
    }  # fmt: skip
    assert set(optimizer.state[model.small.weight]) == {"step", "exp_avg", "exp_avg_sq"}  # too small to be worth it


def rounded(x, kind, signed, block):
    """Each block through the nearest of the numbers that codes stand for, found by comparing with all."""
    out = torch.empty_like(x).view(-1, block)
    for i, part in enumerate(x.reshape(-1, block)):
        top = part.abs().max()
        if kind == "fp8":
            at = (part / top * 448).clamp(min=-448 if signed else 2**-9)
            out[i] = at.to(torch.float8_e4m3fn).float() * top / 448
        else:
            numbers = lowbit.book(kind, signed, CPU)
            out[i] = numbers[((part / top)[:, None] - numbers).abs().argmin(-1)] * top
    return out.view_as(x)


def test_what_is_kept_is_what_the_plan_counts():
    for states in (None, *STATES):
        cfg = Optim(lr=1e-2, states=states)
        model, optimizer = moved(torch.bfloat16, 1, states=states)
        p = model.large.weight
        kept = sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
        assert cfg.state_bytes(2) <= kept / p.numel() < 1.1 * cfg.state_bytes(2), states


@pytest.fixture(scope="module")
def demo():
    """The shipped model's folder and rows of tokens from the shipped text."""
    folder = hub.resolve("ftlib:demo/model")
    text = (folder.parent / "data" / "lora_train.jsonl").read_text()
    ids = torch.tensor(tokenizers.from_pretrained(folder).encode(text)[: 8 * 4 * 64])
    return folder, ids.view(8, 4, 64)


def curve(demo, dtype, **settings):
    """Losses of a short real training."""
    model = models.from_pretrained(demo[0], dtype=dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(".layers.2." in name)
    optimizer, losses = optim.build(model, Optim(lr=1e-3, **settings)), []
    for ids in demo[1].repeat(2, 1, 1):
        logits = model.logits(ids[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optim.step(optimizer, 1.0)
        losses.append(loss.item())
    return torch.tensor(losses)


def test_a_short_real_training_is_near_that_with_wide_states(demo):
    wide = curve(demo, torch.float32)
    assert wide[-6:].mean() < 0.9 * wide[:3].mean()
    gaps = {s: ((curve(demo, torch.float32, states=s) - wide)[-6:].mean() / wide[-6:].mean()).item() for s in STATES}
    most = {"fp32": 1e-5, "bf16": 1e-3, "int8": 1e-3, "fp8": 2e-3, "int4": 0.12}
    assert all(abs(gaps[s]) < most[s] for s in STATES), gaps


def test_stochastic_rounding_is_right_on_average_and_by_place_and_time():
    key, start = (torch.tensor(n, dtype=torch.int32) for n in (7, 0))
    one = noise(start, (64, 1000), key)
    assert torch.equal(noise(start + 5000, (2, 1000), key), one[5:7])  # a shard has the noise of its rows
    other = noise(start, (64, 1000), key + 1)
    pairs = torch.stack((one.flatten(), other.flatten(), one.roll(1).flatten(), one.T.flatten())).float()
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.02
    assert (one.float().mean() / 65535 - 0.5).abs() < 0.01 and one.min() >= 0 and one.max() < 1 << 16
    x = torch.full((64, 1000), -1.001)
    found = to_bfloat16(x, one)
    assert set(found.unique().tolist()) == {-1.0, -1.0078125}
    assert abs(found.double().mean().item() + 1.001) < 1e-4
    exact = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(to_bfloat16(exact.float(), one), exact)


def test_each_parameter_and_step_has_noise_of_its_own():
    model = nn.ParameterList(nn.Parameter(torch.ones(64, 64).bfloat16()) for _ in range(2))
    optimizer, up = optim.build(model, Optim(lr=1e-3, rounding="stochastic")), []
    for _ in range(2):
        for p in model:
            p.data.fill_(1)
            p.grad = torch.full_like(p, -1)
        optim.step(optimizer, None)
        up += [(p > 1).float().flatten() for p in model]
    correlated = torch.corrcoef(torch.stack(up)) - torch.eye(4)
    assert all(0.1 < x.mean() < 0.16 for x in up) and correlated.abs().max() < 0.1  # 1e-3 of 2**-7


def regression(dtype, **settings):
    """Last loss of a linear regression whose steps are smaller than half a bfloat16 of its weights."""
    generator = torch.Generator().manual_seed(0)
    wanted = 1 + 0.2 * torch.rand(64, 64, generator=generator)
    model = nn.Linear(64, 64, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    optimizer = optim.build(model, Optim(lr=1e-3, max_grad_norm=None, **settings))
    for _ in range(400):
        x = torch.randn(32, 64, generator=generator)
        ((model(x.to(dtype)).float() - x @ wanted.T).square().mean() / 2).backward()
        optim.step(optimizer, None)
    return (model.weight.float() - wanted).square().mean().item()


def test_stochastic_rounding_learns_where_bfloat16_stands_still():
    start = 0.2**2 / 3
    stuck, free, wide = (
        regression(torch.bfloat16),
        regression(torch.bfloat16, rounding="stochastic"),
        regression(torch.float32),
    )
    assert wide < 0.02 * start and free < 0.02 * start
    assert stuck > 0.2 * start, (stuck, free, wide)


MODES = [
    *(({"states": states}, torch.float32) for states in STATES),
    ({"rounding": "stochastic"}, torch.bfloat16),
    ({"states": "int4", "rounding": "stochastic", "in_backward": True}, torch.bfloat16),
]


def train(state, first, last):
    for step in range(first, last):
        optim.set_rate(state.optimizer, 1e-2 / (step + 1))
        x = torch.randn(8, 448, generator=torch.Generator().manual_seed(step)).to(state.model.small.weight.dtype)
        state.model(x).square().mean().backward()
        optim.step(state.optimizer, None)


def fresh(dtype, settings):
    model = Net(dtype)
    return State(model, optim.build(model, Optim(lr=1e-2, **settings)), Loader())


@pytest.mark.parametrize(("settings", "dtype"), MODES, ids=str)
def test_a_resumed_run_is_the_same_to_the_bit(settings, dtype, tmp_path):
    run, whole, again = one_process(), fresh(dtype, settings), fresh(dtype, settings)
    train(whole, 0, 3)
    Saver(Checkpoint(every=1), tmp_path, run, {}).save(3, whole)
    train(whole, 3, 6)
    assert Saver(Checkpoint(every=1), tmp_path, run, {}, say=lambda text: None).resume(again) == 3
    train(again, 3, 6)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for slot, value in whole.optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.optimizer.state[b][slot])), slot


def test_moments_of_another_kind_are_not_read(tmp_path):
    state = fresh(torch.float32, {"states": "int8"})
    train(state, 0, 1)
    Saver(Checkpoint(every=1), tmp_path, one_process(), {}).save(1, state)
    for other in ({}, {"states": "fp8"}, {"states": "int4"}):
        with pytest.raises(UserError, match="does not fit"):
            Saver(Checkpoint(every=1), tmp_path, one_process(), {}, say=lambda text: None).resume(
                fresh(torch.float32, other)
            )


class Tied(nn.Module):
    """Its embedding is its head, so that one gradient comes from two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(9, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return torch.tanh(self.inner(self.embed(ids))) @ self.embed.weight.T


@pytest.mark.parametrize(
    "settings", [*({"name": name} for name in ALONE), {"states": "int8", "rounding": "nearest"}], ids=str
)
def test_moving_in_backward_is_moving_after_it(settings):
    models_, norms = [Tied(), Tied()], []
    optimizers = [
        optim.build(model, Optim(lr=1e-2, weight_decay=0.1, in_backward=early, **settings))
        for model, early in zip(models_, (False, True), strict=True)
    ]
    ids = torch.arange(9).repeat(2)
    for step in range(4):
        for model, optimizer in zip(models_, optimizers, strict=True):
            optim.set_rate(optimizer, 1e-2 / (step + 1))
            nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
            assert all((p.grad is None) == (optimizer is optimizers[1]) for p in model.parameters())
            norms.append(optim.step(optimizer, None))
        assert all(torch.equal(a, b) for a, b in zip(models_[0].parameters(), models_[1].parameters(), strict=True))
        torch.testing.assert_close(norms[-1], norms[-2])
    assert not torch.equal(models_[0].inner.weight, Tied().inner.weight)


def planned(recipe, *words):
    module = plugins.load_file(ROOT / "recipes" / f"{recipe}.py")
    file = ROOT / "configs" / f"demo_{recipe.removesuffix('_sft')}.yaml"
    return config.load(module.Config, ["--config", str(file), *words])


def check(recipe, world, *words):
    build.check(planned(recipe, "optim.in_backward=true", *words), world)


REFUSED = [
    ("full_sft", 1, [], "optim.max_grad_norm: clipping"),
    ("full_sft", 1, ["optim.name=muon"], "optim.name: muon looks at whole matrices"),
    ("full_sft", 1, ["optim.nonfinite=skip"], "optim.nonfinite: a step that is left out"),
    ("full_sft", 1, ["batch.micro_rows=2"], "set batch.micro_rows=8, or batch.rows=2"),
    ("full_sft", 1, ["deterministic=elastic"], "deterministic: elastic adds"),
    ("full_sft", 2, ["parallel.dp_replicate=2", "batch.micro_rows=4"], "parallel.dp_replicate=1 and"),
    ("full_sft", 2, ["parallel.tp=2"], "set parallel.tp=1"),
    ("pretrain", 1, ["log.statistics=5"], "log.statistics: they are taken of gradients"),
    ("grpo", 1, [], "this recipe learns in several updates"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "world", "words", "said"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_needs_all_gradients_is_refused_with_moving_in_backward(recipe, world, words, said):
    with pytest.raises(UserError) as error:
        check(recipe, world, *words)
    assert said in str(error.value) and "optim.in_backward" in str(error.value)


def test_what_is_left_is_planned():
    check("full_sft", 1, "optim.max_grad_norm=null", "optim.states=int8", "dtype=bf16", "optim.rounding=stochastic")
    check("full_sft", 2, "optim.max_grad_norm=null", "batch.micro_rows=4")  # shards of one copy
    with pytest.raises(UserError, match="stochastic rounding is for bf16 weights"):
        check("full_sft", 1, "optim.max_grad_norm=null", "optim.rounding=stochastic")
    with pytest.raises(ValueError, match="are for adamw"):
        Optim(name="lion", states="int8")


def test_wide_parameters_round_to_the_nearest_beside_narrow_ones():
    """Stochastic rounding is for bf16: an fp32 norm in the same optimizer moves as without."""

    def trained(rounding):
        model = nn.Sequential(nn.Linear(16, 16).bfloat16(), nn.LayerNorm(16))
        optimizer = optim.build(model, Optim(lr=1e-2, states="fp32", rounding=rounding))
        for step in range(3):
            fill(model, step)
            optim.step(optimizer, None)
        return list(model[1].parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained("stochastic"), trained("nearest"), strict=True))


def test_parameters_of_odd_shapes():
    """A scalar, nothing, three dimensions; float64 computed as such; a gradient with its memory in another order."""
    torch.manual_seed(0)
    shapes = ((), (0, 8), (3, 4, 8), (8, 8))
    ours = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)
    theirs = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in ours)
    mine = optim.build(ours, Optim(lr=1e-2, weight_decay=0, states="fp32"))
    torchs = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a).T if a.ndim == 2 and a.numel() else torch.randn_like(a)
            b.grad = a.grad.clone()
        optim.step(mine, None), torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)  # moments are stored in float32


def test_a_kernel_reads_a_gradient_in_the_order_of_its_memory(monkeypatch):
    seen, move = [], adamw.move
    monkeypatch.setattr(adamw, "move", lambda p, grad, *rest: (seen.append(grad.is_contiguous()), move(p, grad, *rest)))
    model = nn.Linear(16, 16, bias=False)
    model.weight.grad = torch.randn(16, 16).T
    optim.step(optim.build(model, Optim(lr=1e-2, states="fp32")), None)
    assert seen == [True]


def test_places_are_the_low_32_bits():
    wanted = {0: 0, 2**31 - 1: 2**31 - 1, 2**31: -(2**31), 2**32 - 1: -1, 2**32 + 5: 5}
    assert {n: adamw._wrapped(n) for n in wanted} == wanted
