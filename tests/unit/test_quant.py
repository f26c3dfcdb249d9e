"""Quantized frozen bases: against torchao's NF4, against the plain product, exported, and refusals."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity.shrink import reference, relative, shrunk

from ftlib import models
from ftlib.adapters import lora, peft_format
from ftlib.cli import loading
from ftlib.cli import main as tune
from ftlib.errors import UserError
from ftlib.kernels import nf4
from ftlib.models import load
from ftlib.observe.output import trained_share
from ftlib.parallel import check as mesh
from ftlib.quant import FORMATS, FrozenWeight, QuantizedLinear, hold, note, round_through
from ftlib.quant.float8 import compute_in_fp8
from ftlib.sections import Data, Lora, Memory, Parallel, Source


def drawn(out, dim, seed=0):
    return torch.randn(out, dim, generator=torch.Generator().manual_seed(seed))


def test_nf4_is_torchaos():
    from torchao.quantization import NF4Tensor

    weight = drawn(128, 512)
    parts = nf4.quantize(weight)
    theirs = NF4Tensor.from_tensor(weight, nf4.BLOCK, nf4.GROUP)
    same = parts["codes"].flatten() == theirs.quantized_data
    assert same.float().mean() > 0.999  # its levels have four digits, so that few weights fall to a neighbour
    gap = (nf4.dequantize(*parts.values(), torch.float32) - theirs.get_original_weight()).abs()
    # Its scales are 8-bit integers with another rounding; both stay within half a step of the exact ones.
    assert gap.view(-1, 2)[same].max() < 0.02
    exact = weight.view(-1, nf4.BLOCK).abs().amax(1)
    steps = parts["steps"].repeat_interleave(nf4.GROUP)[: len(exact)]
    torch.testing.assert_close(parts["mean"][0], exact.mean())
    assert ((parts["mean"] + parts["scales"] * steps - exact).abs() <= steps / 2 + 1e-6).all()


def test_every_code_is_the_nearest_level():
    weight = drawn(4, 192)
    parts = nf4.quantize(weight)
    levels = torch.tensor(nf4.LEVELS)
    scaled = weight.view(-1, nf4.BLOCK) / weight.view(-1, nf4.BLOCK).abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - levels).abs().argmin(-1).flatten()
    codes = torch.stack((parts["codes"] >> 4, parts["codes"] & 15), -1).flatten()
    assert torch.equal(codes.long(), nearest)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(3, 64), (70, 320), (256, 128)])
def test_storage_and_error(form, shape):
    weight = drawn(*shape)
    parts = FORMATS[form].quantize(weight)
    empty = FORMATS[form].empty(shape, "meta")
    assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {n: (p.shape, p.dtype) for n, p in empty.items()}
    back = FORMATS[form].dequantize(*parts.values(), torch.float32)
    error = float((back - weight).norm() / weight.norm())
    assert 0 < error < {"nf4": 0.11, "int8": 0.012}.get(form, 0.03)
    zeros = FORMATS[form].quantize(torch.zeros(shape))
    assert not FORMATS[form].dequantize(*zeros.values(), torch.float32).any()


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_each_row_has_a_scale_of_its_own(form):
    weight = drawn(9, 64) * torch.logspace(-4, 4, 9)[:, None]
    gap = FORMATS[form].dequantize(*FORMATS[form].quantize(weight).values(), torch.float32) - weight
    assert (gap.norm(dim=1) / weight.norm(dim=1)).max() < {"int8": 0.012, "fp8": 0.03}[form]


def test_a_gpu_is_told_how_many_scales_share_a_step(monkeypatch):
    """256 of a whole matrix; fewer of a piece whose rows are no whole groups."""
    told = SimpleNamespace(dequantize_blocks=lambda codes, scales, steps, mean, levels, group, *_: group)
    monkeypatch.setitem(sys.modules, "ftlib.kernels.nf4_triton", told)
    monkeypatch.setattr(nf4, "_levels", lambda device: None)
    whole = nf4.quantize(drawn(40, 640))  # 400 blocks
    piece = nf4.cut(whole, (40, 640), (0, 20, 20))
    on_gpu = {"codes": SimpleNamespace(device=SimpleNamespace(type="cuda"))}
    found = [nf4.dequantize(*(parts | on_gpu).values(), torch.bfloat16) for parts in (whole, piece)]
    assert found == [256, math.gcd(256, 200)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(70, 384), (512, 128), (5, 2, 12, 256), (3, 128, 2, 64)])
def test_pieces_have_the_values_of_the_whole(form, shape):
    """Each process of two, three or four quantizes the whole and keeps a piece: no value may depend on how many."""
    if form == "fp8_turned" and len(shape) > 2:
        return  # of linear layers only
    whole = drawn(torch.Size(shape[:-1]).numel(), shape[-1])
    whole *= torch.rand(len(whole), 1, generator=torch.Generator().manual_seed(1)) * 9  # every scale its own
    parts = FORMATS[form].quantize(whole)
    kept = FORMATS[form].dequantize(*parts.values(), torch.float32).view(shape)
    for dim, size in enumerate(shape):
        unit = FORMATS[form].block if dim == len(shape) - 1 else 1
        for ways in (ways for ways in (2, 3, 4) if size % (ways * unit) == 0):
            length = size // ways
            for start in range(0, size, length):
                piece = FORMATS[form].cut(parts, shape, (dim, start, length))
                found = FORMATS[form].dequantize(*piece.values(), torch.float32)
                assert torch.equal(found, kept.narrow(dim, start, length).reshape(found.shape)), (dim, ways, start)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_the_layer_is_the_product_with_its_weight(form, compiled):
    linear = models.language_model.Linear(128, 96, bias=True)
    quantized = QuantizedLinear(linear, form)
    quantized.base.fill(linear.weight.detach())
    run = torch.compile(quantized, fullgraph=True, backend="aot_eager") if compiled else quantized
    x = drawn(5, 128).view(1, 5, 128).requires_grad_()
    y = run(x)
    expected = F.linear(x, quantized.weight, linear.bias)
    assert torch.allclose(y, expected, atol=1e-6)
    grads = [torch.autograd.grad(out.sin().sum(), x, retain_graph=True)[0] for out in (y, expected)]
    assert torch.allclose(*grads, atol=1e-5)


def test_quantized_matrices_count_as_what_they_are():
    linear = models.language_model.Linear(128, 96, bias=True)
    plain, quantized = (trained_share(layer) for layer in (linear, QuantizedLinear(linear, "nf4")))
    assert f"of {128 * 96 + 96:,} parameters" in plain and f"of {128 * 96 + 96:,} parameters" in quantized


def test_recomputed_in_backward():
    """What backward reads of a layer may be asked for once (torch.utils.checkpoint)."""
    linear = models.language_model.Linear(64, 48, bias=False)
    quantized = QuantizedLinear(linear, "nf4")
    quantized.base.fill(linear.weight.detach())
    x = drawn(5, 64).requires_grad_()
    ys = quantized(x), torch.utils.checkpoint.checkpoint(quantized, x, use_reentrant=False)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in ys]
    assert torch.equal(*grads)


def test_adapters_see_the_quantized_weight():
    """DoRA's lengths and a start from the weight's main directions read the matrix: they get the one that computes."""
    for options in ({"dora": True}, {"init": "pissa"}):
        model = models.from_pretrained("ftlib:demo/model", dtype=torch.float32)
        weights = {name: m.weight.detach() for name, m in model.named_modules() if name.endswith("_proj")}
        assert hold(model, "int8") == 28
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.base.fill(weights[name])
        ids = torch.arange(3, 30)[None]
        before = model.logits(ids)
        lora.attach_section(model, Lora(rank=4, **options))
        lora.reset(model, 0)
        assert torch.allclose(model.logits(ids), before, atol=2e-4)
    assert "28 matrices in int8" in note(model)[0]


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_exported_with_its_quantized_base(form, tmp_path, capsys):
    """transformers computes what was trained: the base as it was kept, and with the adapter merged into it. Merged into
    the plain base it does not, and that is said."""
    from transformers import AutoModelForCausalLM

    config = shrunk("llama-3.2-1b", head_dim=16, intermediate_size=128)
    reference(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    model = load.build(tmp_path / "base", torch.float32)
    weights = load.check_weights(model, tmp_path / "base")
    hold(model, form)
    lora.attach(model, "all-linear", rank=4)
    model.to_empty(device="cpu")
    model.tie()
    load.load_weights(model, weights)
    lora.reset(model, 0)
    ids = torch.arange(3, 30)[None]

    def theirs(folder):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits

    models.save_pretrained(model, tmp_path / "kept")
    with torch.no_grad():
        kept = model.logits(ids)
        assert relative(theirs(tmp_path / "kept"), kept) < 1e-5 < relative(theirs(tmp_path / "base"), kept)
        for _, _, factors in lora.adapted(model):
            factors.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        trained = model.logits(ids)
    peft_format.save(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    words = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter")]
    shutil.copytree("ftlib/assets/demo/model", tmp_path / "base", dirs_exist_ok=True, ignore=lambda folder, names: [
        name for name in names if not name.startswith(("tokenizer", "special"))
    ])  # fmt: skip
    assert tune([*words, str(tmp_path / "merged"), "--quantize", form]) == 0
    assert relative(theirs(tmp_path / "merged"), trained) < 1e-5 and "note:" not in capsys.readouterr().err
    answering, _ = loading.load(tmp_path / "base", tmp_path / "adapter", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        assert relative(answering.logits(ids), trained) < 1e-5
    assert f"the base has what {form} keeps of it, as in training" in capsys.readouterr().err
    assert tune([*words, str(tmp_path / "other")]) == 0
    assert relative(theirs(tmp_path / "other"), trained) > 1e-3 and f"--quantize {form}" in capsys.readouterr().err
    wrong = "int8" if form != "int8" else "fp8"
    assert tune([*words, str(tmp_path / "wrong"), "--quantize", wrong]) == 2
    assert f"kept in {form}, not in {wrong}" in capsys.readouterr().err


def test_operator_of_stacks_is_sound():
    """Fake tensors, compiled code and gradients of torch.ops.ftlib.frozen_grouped_linear."""
    x, ends = drawn(6, 8).requires_grad_(), torch.tensor([2, 2, 6], dtype=torch.int32)
    for transposed, shape in ((False, [3, 5, 8]), (True, [3, 8, 5])):
        parts = list(FORMATS["int8"].quantize(drawn(shape[0] * shape[1], shape[2])).values())
        operands = (x, ends, drawn(3, 5), parts, "int8", shape, transposed)
        torch.library.opcheck(torch.ops.ftlib.frozen_grouped_linear.default, operands)


@pytest.mark.parametrize(
    ("name", "form", "matrices"),
    [("mixtral-8x7b", "nf4", 3 * 6), ("gpt-oss-20b", "int8", 2 * 6), ("qwen3-30b-a3b", "nf4", 3 * 6),
     ("glm-4.5-air", "nf4", 7 + 2 * 9), ("qwen1.5-moe-a2.7b", "nf4", 3 * 9), ("olmoe-1b-7b", "int8", 3 * 6)],
)  # fmt: skip
def test_stacked_experts(name, form, matrices, tmp_path):
    """Loaded into few bits they compute, forward and backward, as the plain stacks they stand for."""
    config = shrunk(name, intermediate_size=64)
    if "moe_intermediate_size" in config:
        config["moe_intermediate_size"] = 64
    if "shared_expert_intermediate_size" in config:
        config["shared_expert_intermediate_size"] = 128
    if "head_dim" in config:
        config["head_dim"] = 16
    reference(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, found = torch.arange(3, 30)[None], []
    for quantized in (True, False):
        model = load.build(tmp_path, torch.float32)
        weights = load.check_weights(model, tmp_path)
        count = hold(model, form) if quantized else 0
        lora.attach(model, "all-linear", rank=4)
        model.to_empty(device="cpu")
        model.tie()
        load.load_weights(model, weights)
        lora.reset(model, 0)
        if quantized:  # q, k, v, o, and two stacks, three matrices of a shared expert; or three of a dense layer
            assert count == matrices and f"{count} matrices in {form}" in note(model)[0]
        else:
            plain = model.logits(ids).detach()
            round_through(model, form)
        for _, _, factors in lora.adapted(model):
            torch.nn.init.normal_(factors.lora_B, 0, 0.1, torch.Generator().manual_seed(3))
        logits = model.logits(ids)
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": logits.detach(), **grads})
    assert found[0].keys() == found[1].keys()
    assert max(relative(found[0][name], value) for name, value in found[1].items()) < 1e-4
    assert relative(found[0]["logits"], plain) > 1e-3


@pytest.mark.parametrize(
    ("recipe", "more", "says"),
    [
        ("full_sft", [], "only the frozen matrices"),
        ("lora_sft", ["model.quantize=nf5"], "expected 'nf4' or 'int8'"),
        ("lora_sft", ["model.quantize=null", "model.fp8_smallest=64"], "which layers multiply in 8 bits"),
        ("lora_sft", ["qat=int4"], "(write {scheme: int4})"),
        ("full_sft", ["qat={scheme: fp8, group: 32}"], "qat.group: is for int4 and int8_int4; fp8 has a scale a row"),
    ],
)
def test_refused(recipe, more, says, tmp_path, capsys):
    config = f"configs/demo_{recipe.removesuffix('_sft')}.yaml"
    words = ["validate", f"recipes/{recipe}.py", "--config", config, "model.quantize=nf4", *more]
    assert tune([*words, f"output_dir={tmp_path}"]) == 2
    assert says in capsys.readouterr().err


def test_cutting_inside_a_block_is_refused(tmp_path):
    """Known before anything is loaded, with the layer, the keys and what works."""
    settings = shrunk("llama-3.2-1b", head_dim=16, intermediate_size=192)  # 3 blocks, for 2 processes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load.build(tmp_path, torch.float32)
    hold(model, "nf4")
    cfg = SimpleNamespace(data=Data(sources=(Source(path="x"),), seq_len=64), memory=Memory(), parallel=Parallel(tp=2))
    with pytest.raises(UserError, match=r"o_proj has 64 inputs, kept in blocks of 64[\s\S]*model.quantize, p"):
        mesh.check(model, cfg, 1, 2)
    model = load.build(tmp_path, torch.float32)
    hold(model, "int8")
    mesh.check(model, cfg, 1, 2)


@pytest.mark.parametrize(("source", "layer"), [("llama-3.2-1b", "gate_proj"), ("gpt-oss-20b", "gate_up_proj")])
def test_what_is_cut_in_equal_parts_is_said_once(source, layer, tmp_path):
    """A size that tp does not divide is no matter of blocks; blocks of a transposed stack lie along its outputs."""
    settings = shrunk(source, head_dim=32, intermediate_size=129 if layer == "gate_proj" else 96)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load.build(tmp_path, torch.float32)
    hold(model, "int8" if layer == "gate_proj" else "nf4")
    cfg = SimpleNamespace(data=Data(sources=(Source(path="x"),), seq_len=64), memory=Memory(), parallel=Parallel(tp=2))
    with pytest.raises(UserError) as found:
        mesh.check(model, cfg, 1, 2)
    says = "intermediate_size 129 is no multiple" if layer == "gate_proj" else "gate_up_proj has 192 outputs, kept in b"
    assert says in str(found.value) and str(found.value).count("fix:") == 1, found.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "nf4"])
def test_bytes_that_fill_no_whole_number(form, dtype):
    """A matrix of 33 x 65 codes travels as numbers of the model's dtype, filled before or after that is decided."""
    weight, found = drawn(33, 65), []
    for first in (True, False):
        base = FrozenWeight(weight.shape, form, "cpu", dtype)
        steps = (lambda base=base: base.fill(weight), base.spread)
        for step in steps if first else steps[::-1]:
            step()
        found.append(base.dequantize())
    assert torch.equal(*found) and relative(found[0].float(), weight) < 0.04


@pytest.mark.parametrize(("source", "layer"), [("qwen2.5-7b", "q_proj"), ("qwen2.5-7b", "down_proj")])
@pytest.mark.parametrize("fp8", [False, True])
def test_training_a_quantized_layer_whole_is_refused(source, layer, fp8, tmp_path):
    """One with a bias has something to train, which is not what was asked for; one without has nothing."""
    (tmp_path / "config.json").write_text(json.dumps(shrunk(source)))
    model = load.build(tmp_path, torch.float32)
    compute_in_fp8(model, False, 16, True) if fp8 else hold(model, "int8")
    keys = r"lora.modules_to_save, model.quantize, model.fp8"
    with pytest.raises(UserError, match=rf"'{layer}' is kept in few bits[\s\S]*{keys}"):
        lora.attach_section(model, Lora(targets=("o_proj",), modules_to_save=(layer,)))
