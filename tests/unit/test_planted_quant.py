"""Low precision where planted faults went unseen: transposed codes in pieces, zeros, ties, what is rounded once, scales
of weights that are gathered together, groups in the command that a run proposes."""

import shlex

import pytest
import torch
from faults.tiny_training import one_process
from tiny_model import ROOT, write_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ftlib import config, models, plugins, quant
from ftlib.adapters.factors import LoraFactors
from ftlib.kernels.fp8_linear import E4M3, E5M2, cast, fp8_frozen_linear, fp8_linear
from ftlib.layers.linear import Linear
from ftlib.parallel import gather8
from ftlib.quant.float8 import Float8Linear
from ftlib.quant.schemes import kept
from ftlib.sections import Lora

BOTH = pytest.mark.parametrize("rows", [False, True], ids=["tensorwise", "rowwise"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_piece_has_its_own_transpose(dim):
    """`dequantize` does not read it, backward does."""
    form, shape = quant.FORMATS["fp8_turned"], (48, 96)
    parts, length = form.quantize(drawn(*shape)), shape[dim] // 3
    for start in range(0, shape[dim], length):
        piece = form.cut(parts, shape, (dim, start, length))
        assert torch.equal(piece["turned"].view(torch.uint8), piece["codes"].t().view(torch.uint8)), start


@BOTH
def test_zeros_have_a_scale_and_products_with_them_are_zero(rows):
    """Padding, a gradient of masked tokens alone, a matrix that starts at 0: NaN would end the run."""
    x, w = drawn(16, 32), drawn(48, 32, seed=1)
    for kind in (E4M3, E5M2):
        codes, scales = cast(torch.zeros(16, 32), rows, kind)
        assert not codes.float().any() and (scales > 0).all() and scales.isfinite().all()
    kept_w = quant.FORMATS["fp8_turned"].quantize(w)
    for a, b, upstream in ((0 * x, w, 1.0), (x, 0 * w, 1.0), (x, w, 0.0)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        y = fp8_linear(a, b, rows)
        frozen = fp8_frozen_linear(a, *kept_w.values(), rows)
        grads = torch.autograd.grad((y + frozen).sum() * upstream, (a, b))
        assert all(t.isfinite().all() for t in (y, frozen, *grads))
        assert upstream or not any(grad.any() for grad in grads)


def test_what_is_kept_is_the_cast():
    """At ties too, on either side of 0, and where there is no number: the integers do what PyTorch's cast does."""
    found = torch.arange(0x3F00, 0x4100, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    middles = (found[1:] + found[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (0.0, 9.0)]
    x = torch.cat((found, middles, *beside, drawn(4000), drawn(4000) * 1e-38, torch.tensor([0.0, torch.inf])))
    x = torch.cat((x, -x))
    assert torch.equal(kept(x, torch.bfloat16), x.bfloat16())
    none = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert kept(none, torch.bfloat16).isnan().tolist() == [True] * 4 + [False]
    assert torch.equal(kept(x, torch.float32), x)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_a_narrow_weight_and_its_adapter_are_merged_in_float32(options):
    """Rounded to bfloat16 once, when they are written, and not before they are added."""
    linear = Linear(64, 48, bias=False).bfloat16()
    nn.init.normal_(linear.weight, 0, 0.05, torch.Generator().manual_seed(2))
    factors = LoraFactors(linear, Lora(rank=8, **options), 8, 16.0, torch.float32)
    with torch.no_grad():
        factors.lora_A.copy_(drawn(8, 64) / 8)
        factors.lora_B.copy_(drawn(48, 8, seed=1) / 8)
        wanted = linear.weight.double() + factors.scale * factors.lora_B.double() @ factors.lora_A.double()
        if factors.magnitude is not None:
            factors.magnitude.copy_(1 + drawn(48, seed=3).abs())
            wanted *= (factors.magnitude.double() / wanted.norm(dim=1))[:, None]
        merged = factors.merged(linear.weight)
    assert merged.dtype == torch.float32
    assert (merged - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_each_weight_is_gathered_with_its_own_scale():
    """Of one unit, two that are coded and a plain one between them; the scales are 2**12 apart."""
    one_process()
    mesh = init_device_mesh("cpu", (1,))
    layers = [Float8Linear(Linear(32, 48, bias=False), rows=False) for _ in range(2)]
    unit = nn.Sequential(layers[0], nn.LayerNorm(48), Linear(48, 32, bias=False), layers[1])
    for i, layer in enumerate(layers):
        nn.init.normal_(layer.weight, 0, 8.0 ** (4 * i - 2), torch.Generator().manual_seed(i))
    weights = {name: p.detach().clone() for name, p in unit.named_parameters()}
    gather = gather8.Gather8(fully_shard(unit, mesh=mesh))
    packed = torch.cat([weight.flatten() for weight in weights.values()])
    arrived = gather.allocate(packed.shape, dtype=packed.dtype, device=packed.device)
    gather(arrived, packed.clone(), mesh.get_group())
    for (name, weight), found in zip(weights.items(), arrived.split(gather.sizes), strict=True):
        codes, scale = cast(weight, False) if name in ("0.weight", "3.weight") else (weight, 1.0)
        assert torch.equal(found.view_as(weight), codes.float() * scale), name


@pytest.mark.parametrize(("group", "words"), [(16, ["to.group=16"]), (None, [])])
def test_the_command_proposed_rounds_as_the_run_did(group, words, tmp_path):
    """Another group would give another model, and no error."""
    file = write_config(tmp_path / "config.json", tmp_path, tmp_path / "rows.jsonl", qat={"scheme": "int4"})
    module = plugins.load_file(ROOT / "recipes/lora_sft.py")
    more = [f"qat.group={group}", "data.seq_len=48"] if group else ["data.seq_len=48"]
    cfg = config.load(module.Config, ["--config", str(file), *more])
    model = models.from_pretrained("ftlib:demo/model")
    line = quant.commands(cfg, model, merged=False)[1]
    found = config.load(plugins.load_file(ROOT / "recipes/quantize.py").Config, shlex.split(line)[3:])
    assert [word for word in shlex.split(line) if word.startswith("to.group")] == words
    assert (found.to.scheme, found.to.inputs_a_scale) == (cfg.qat.scheme, cfg.qat.inputs_a_scale)
    assert (found.data, found.batch, found.dtype) == (cfg.data, cfg.batch, cfg.dtype)
