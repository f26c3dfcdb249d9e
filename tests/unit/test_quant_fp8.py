"""Products in 8-bit floats: against torchao's, against the rounded operands, in layers; what a result tells of it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from faults.tiny_training import one_process
from parity.shrink import reference, relative, shrunk
from tiny_model import fill_bases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.proxy_tensor import make_fx

from ftlib import models, quant
from ftlib.adapters import lora, peft_format
from ftlib.adapters.fuse import fuse
from ftlib.cli import checkpoints
from ftlib.cli import main as tune
from ftlib.kernels.fp8_linear import E4M3, E5M2, cast, fp8_frozen_linear, fp8_linear, keep_in_graphs
from ftlib.layers.linear import Linear, project
from ftlib.models.load import base_state, build
from ftlib.parallel import gather8
from ftlib.quant.float8 import Float8Frozen, Float8Linear, compute_in_fp8
from ftlib.sections import Model

BOTH = pytest.mark.parametrize("rows", [False, True], ids=["tensorwise", "rowwise"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, rows, kind=E4M3):
    codes, scales = cast(x, rows, kind)
    return codes.double() * scales


def gradients(y, *inputs):
    return y.detach(), *torch.autograd.grad((y * drawn(*y.shape, seed=9)).sum(), inputs)


@BOTH
def test_every_product_is_that_of_the_rounded_operands(rows):
    x, w = drawn(37, 64).requires_grad_(), drawn(48, 64, seed=1).requires_grad_()
    x.data[3] *= 100  # an outlier
    ours = gradients(fp8_linear(x, w, rows), x, w)
    grad, kind = drawn(37, 48, seed=9), E4M3 if rows else E5M2
    wanted = (
        rounded(x, rows) @ rounded(w, rows).T,
        rounded(grad, rows, kind) @ rounded(w.T, rows).T,
        rounded(grad.T, rows, kind) @ rounded(x.T, rows).T,
    )
    assert all(relative(mine, exact) < 1e-5 for mine, exact in zip(ours, wanted, strict=True))
    assert relative(rounded(x.detach(), rows), x.detach()) < 0.04  # 3 bits of fraction


@BOTH
def test_what_a_scale_comes_from_is_float32(rows):
    """Compiled code has the scale twice, once from what it still holds and once from what it stored: in bfloat16 those
    differ, and where a power of two lies between them, one product was twice what it should be."""
    traced = make_fx(lambda x: cast(x, rows, E5M2))(drawn(8, 16).bfloat16())
    largest = [node.meta["val"].dtype for node in traced.graph.nodes if node.target is torch.ops.aten.amax.default]
    assert largest == [torch.float32]


@BOTH
def test_it_is_torchaos(rows):
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear as Theirs

    plain = torch.nn.Linear(64, 48, bias=False)
    plain.weight.data = 0.1 * drawn(48, 64, seed=1)  # others may fall between two codes, where the last bit decides
    recipe = Float8LinearConfig.from_recipe_name("rowwise" if rows else "tensorwise")
    object.__setattr__(recipe, "emulate", True)
    object.__setattr__(recipe, "round_scales_to_power_of_2", not rows)
    theirs = Theirs.from_float(plain, config=recipe)
    x = drawn(32, 64).requires_grad_()
    found = gradients(theirs(x), x, theirs.weight)
    ours = gradients(fp8_linear(x, plain.weight, rows), x, plain.weight)
    assert all(relative(mine, its) < 1e-5 for mine, its in zip(ours, found, strict=True))


@BOTH
def test_a_frozen_weight_is_the_same_forward_and_backward(rows):
    x = drawn(33, 64).requires_grad_()
    kept = quant.FORMATS["fp8_turned"].quantize(drawn(48, 64, seed=1))
    whole = quant.FORMATS["fp8"].dequantize(kept["codes"], kept["scales"], torch.float64)
    ours = gradients(fp8_frozen_linear(x, *kept.values(), rows), x)
    folded = drawn(33, 48, seed=9) * kept["scales"]
    grad = rounded(folded, rows, E4M3 if rows else E5M2) / kept["scales"]
    assert relative(ours[0], rounded(x, rows) @ whole.T) < 1e-5 and relative(ours[1], grad @ whole) < 1e-5
    again = gradients(fp8_frozen_linear(x, kept["codes"], kept["scales"], None, rows), x)
    assert all(torch.equal(mine, its) for mine, its in zip(ours, again, strict=True))


@BOTH
def test_operands_are_as_the_matrix_units_want_them(rows, monkeypatch):
    """What torch._scaled_mm asks of a GPU's operands, and that nothing else is lost on the way to it."""
    calls = []

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous() and not any(n % 16 for n in (*b.shape, a.shape[1]))
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
        assert (scale_a.shape, scale_b.shape) == (((len(a), 1), (1, b.shape[1])) if rows else ((1, 1), (1, 1)))
        assert out_dtype == torch.bfloat16 and not a.dtype == b.dtype == E5M2
        calls.append(use_fast_accum)
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    x, w = drawn(37, 64).bfloat16().requires_grad_(), drawn(48, 64, seed=1).bfloat16().requires_grad_()
    kept = quant.FORMATS["fp8_turned"].quantize(w.detach())
    upstream = drawn(48, 37, seed=2).bfloat16().t()  # another layout than its shape's own
    found = []
    for native in (False, True):
        monkeypatch.setattr("ftlib.kernels.fp8_linear._native", lambda _, native=native: native)
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        found.append(torch.autograd.grad(fp8_linear(x, w, rows), (x, w), upstream))
        for turned in (kept["turned"], None):
            y = fp8_frozen_linear(x, kept["codes"], kept["scales"], turned, rows)
            found[-1] += (y, *torch.autograd.grad(y, x, upstream))
    assert calls == [True, False, False, True, False, True, False]
    assert all(torch.equal(native, emulated) for emulated, native in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_coded_twice_is_coded_once(dtype):
    """What makes gathering in 8 bits exact: whole again, a weight has the codes' values, whatever its largest is."""
    for seed in range(40):
        weight = (drawn(16, 64, seed=seed) * 2.0 ** (seed - 20) * (1 + seed / 40)).to(dtype)
        once = rounded(weight, False)
        again = rounded(once.to(dtype), False)
        assert torch.equal(once, once.to(dtype).double()) and torch.equal(once, again), seed
        scale = cast(weight, False)[1]
        assert torch.frexp(scale)[0] == 0.5 and 0.5 < float(weight.abs().amax() / scale / 448) <= 1


@BOTH
def test_what_is_no_number_stays_none(rows):
    """A NaN makes the product NaN: a loss of numbers after it would hide that training has failed."""
    codes, scales = cast(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), rows)
    assert (codes.float() * scales)[0, 1].isnan()
    x, w = drawn(16, 32), drawn(48, 32, seed=1)
    x[3, 5] = float("nan")
    assert fp8_linear(x, w, rows)[3].isnan().all()
    assert gather8.power_of_two(torch.tensor([2.0, float("nan")]), E4M3).isnan().tolist() == [False, True]


def test_weights_are_gathered_in_eight_bits(monkeypatch):
    """A unit of FSDP2 with a layer in fp8, a plain one and a norm: what is sent, and what arrives."""
    unit = torch.nn.Sequential(
        Float8Linear(Linear(64, 48, bias=False), rows=False), Float8Linear(Linear(48, 64), rows=True),
        Linear(64, 48, bias=True), torch.nn.LayerNorm(48),
    )  # fmt: skip
    weights = {name: p.detach().clone() for name, p in unit.named_parameters()}

    def wanted(name, weight):
        return rounded(weight, False).float() if name == "0.weight" else weight

    sent, really = [], torch.distributed.all_gather_into_tensor
    counted = lambda out, own, group: (sent.append(own.nbytes), really(out, own, group=group))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", counted)
    one_process()
    mesh = init_device_mesh("cpu", (1,))
    gather = gather8.Gather8(fully_shard(unit, mesh=mesh))  # which, alone, does not call it
    packed = torch.cat([weight.flatten() for weight in weights.values()])
    arrived = gather.allocate(packed.shape, dtype=packed.dtype, device=packed.device)
    gather(arrived, packed.clone(), mesh.get_group())
    assert sent == [packed.nbytes - 3 * 64 * 48]
    for (name, weight), found in zip(weights.items(), arrived.split(gather.sizes), strict=True):
        assert torch.equal(found.view_as(weight), wanted(name, weight)), name


@BOTH
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_is_eager(frozen, rows):
    linear = Linear(64, 48, bias=True)
    linear.load_state_dict({"weight": 0.1 * drawn(48, 64, seed=1), "bias": 0.1 * drawn(48, seed=2)})
    layer = Float8Frozen(linear, rows, turn=True) if frozen else Float8Linear(linear, rows)
    if frozen:
        layer.base.fill(linear.weight.detach())
    x = drawn(2, 16, 64).requires_grad_()
    inputs = (x, linear.bias) if frozen else (x, linear.weight, linear.bias)
    eager = gradients(layer(x), *inputs)
    keep_in_graphs()
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), *inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, compiled, strict=True))
    assert relative(eager[0], F.linear(x, linear.weight, linear.bias)) < 0.06


@BOTH
def test_codes_lie_row_by_row_wherever_their_numbers_lie(rows):
    """A transposed operand is not copied once more, byte by byte, on its way to a product."""
    codes, _ = cast(drawn(32, 16).T, rows)
    assert codes.is_contiguous() and codes.shape == (16, 32)


@BOTH
def test_fused_siblings_are_the_layers(rows):
    """One group, as what follows would round otherwise after another order of a sum."""
    found = []
    for fused in (False, True):
        model = models.from_pretrained("ftlib:demo/model", dtype=torch.float32).train()
        weights = {name: weight.detach() for name, weight in base_state(model).items()}
        assert compute_in_fp8(model, rows, 16, frozen=True) == 28
        fill_bases(model, weights)
        lora.attach(model, "all-linear", rank=4)
        lora.reset(model, 0)
        assert not fused or fuse(model) == 16
        for _, _, factors in lora.adapted(model):
            torch.nn.init.normal_(factors.lora_B, 0, 0.1, torch.Generator().manual_seed(3))
        attention = model.model.layers[1].self_attn
        siblings = attention.q_proj, attention.k_proj, attention.v_proj
        x = drawn(2, 20, siblings[0].in_features).requires_grad_()
        y = torch.cat(project(siblings, x), -1)
        factors = [p for linear in siblings for p in linear.adapters["policy"].parameters()]
        found.append(gradients(y, x, *factors))
        with lora.use(model, None):
            found[-1] += gradients(torch.cat(project(siblings, x), -1), x)
    gaps = [relative(ours, plain) for ours, plain in zip(*found, strict=True)]
    # The gradient of x alone: one product over all siblings' outputs has other scales than theirs apart.
    assert max(gaps[:1] + gaps[2:-1]) < 1e-5 and max(gaps[1], gaps[-1]) < (0.05 if rows else 0.15), gaps


@pytest.mark.parametrize(("more", "bits"), [({}, 16), ({"quantize": "fp8"}, 8)])
def test_what_is_converted_and_what_it_keeps(more, bits, tmp_path):
    """Sizes that matrix units do not take stay plain, or 8 bits without products; a transpose is kept without
    `quantize` alone."""
    (tmp_path / "config.json").write_text(json.dumps(shrunk("llama-3.2-1b", head_dim=16, intermediate_size=72)))
    model = build(tmp_path, torch.float32)
    section = Model(path=str(tmp_path), fp8="rowwise", fp8_smallest=16, **more)
    quant.attach(model, SimpleNamespace(model=section, lora=True))
    kept, products = quant.note(model)
    layers = len(model.model.layers)
    assert f"base: {(7 if more else 4) * layers} matrices in fp8, {bits}." in kept
    assert f"products of {4 * layers} layers of {7 * layers}" in products
    assert not any(isinstance(layer, Float8Frozen) for layer in model.model.layers[0].mlp.children())


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({}, None), ({"quantize": "nf4"}, "nf4"), ({"fp8": "rowwise", "fp8_smallest": 16}, "fp8"),
        ({"fp8": "tensorwise", "fp8_smallest": 64}, "fp8 in some layers"),
        ({"fp8": "rowwise", "fp8_smallest": 64, "quantize": "fp8"}, "fp8"),
    ],
)  # fmt: skip
def test_a_folder_and_a_checkpoint_tell_of_one_base(section, kept, tmp_path, capsys):
    name, base = str(tmp_path / "base"), tmp_path / "base"
    settings = shrunk("llama-3.2-1b", head_dim=16, intermediate_size=128)  # keys and values of 32: small layers
    reference(settings).save_pretrained(base)
    (base / "config.json").write_text(json.dumps(settings))
    shutil.copy("ftlib/assets/demo/model/tokenizer.json", base)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": section}))
    assert checkpoints.base_form(tmp_path / "checkpoints/step_000001", base) == kept
    model = build(base, torch.float32)
    quant.attach(model, SimpleNamespace(model=Model(path=name, **section), lora=True))
    lora.attach(model, "all-linear", rank=4)
    lora.reset(model.to_empty(device="cpu"), 0)
    peft_format.save(model, tmp_path / "final", base=name)
    assert peft_format.base_form(tmp_path / "final") == kept
    assert tune(["merge", name, str(tmp_path / "final"), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().err
    assert f"kept in {kept}, and lies on the plain one" in said if kept else "note:" not in said
    if kept and " " in kept:
        assert "no --quantize gives that base" in said
        assert tune(["merge", name, str(tmp_path / "final"), str(tmp_path / "other"), "--quantize", "fp8"]) == 2
        assert f"kept in {kept}, not in fp8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "more", "says"),
    [
        ("full", ["parallel.tp=2"], "scales of 8-bit products are those of whole matrices"),
        ("lora", ["model.quantize=nf4"], "a base kept in nf4 is made whole"),
        ("full", ["model.fp8_smallest=100000"], "no layer has 100000 inputs and outputs"),
        ("full", ["model.fp8=fp8"], "expected 'tensorwise' or 'rowwise'"),
    ],
)
def test_refused(recipe, more, says, tmp_path, capsys):
    words = ["validate", f"recipes/{recipe}_sft.py", "--config", f"configs/demo_{recipe}.yaml", "model.fp8=rowwise"]
    assert tune([*words, *more, f"output_dir={tmp_path}"]) == 2
    assert says in capsys.readouterr().err
