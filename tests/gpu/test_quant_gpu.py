"""Low precision on a GPU: Triton's NF4, and compiled layers against the plain formula in float64."""

import pytest
import torch

from ftlib.kernels import nf4
from ftlib.kernels.fp8_linear import E5M2, cast, fp8_frozen_linear, fp8_linear, keep_in_graphs
from ftlib.quant import FORMATS, rowwise
from ftlib.quant.float8 import supported
from ftlib.quant.fused import frozen_lora_project

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def normal(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") * scale


@pytest.mark.parametrize("shape", [(3, 64), (1000, 4096), (4096, 14336)])
def test_nf4_equals_its_reference(shape):
    """To the rounding of one multiplication: the kernel's are fused with additions."""
    parts = nf4.quantize(normal(*shape).bfloat16()).values()
    for dtype in (torch.bfloat16, torch.float32):
        exact = nf4.dequantize_reference(*parts, dtype)
        found = nf4.dequantize(*parts, dtype)
        torch.testing.assert_close(found, exact, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=0)
        wider = torch.zeros(shape[0], shape[1] + 48, dtype=dtype, device="cuda")
        nf4.dequantize(*parts, dtype, out=wider[:, : shape[1]])
        assert torch.equal(wider[:, : shape[1]], found) and not wider[:, shape[1] :].any()


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 48), (1000, 4096), (4096, 14336)])
def test_rowwise_codes_equal_their_reference(shape, kind):
    codes, scales = rowwise.quantize(normal(*shape).bfloat16(), kind).values()
    for dtype in (torch.bfloat16, torch.float32):
        exact = rowwise.dequantize_reference(codes, scales, dtype)
        assert torch.equal(rowwise.dequantize(codes, scales, dtype), exact)
        wider = torch.zeros(shape[0], shape[1] + 48, dtype=dtype, device="cuda")
        rowwise.dequantize(codes, scales, dtype, out=wider[:, : shape[1]])
        assert torch.equal(wider[:, : shape[1]], exact) and not wider[:, shape[1] :].any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("dim", "outs"), [(512, (512, 128, 128)), (1536, (512,))])
def test_fused_projection_of_quantized_weights(dim, outs, form, compiled):
    held = [FORMATS[form].quantize(normal(out, dim, scale=dim**-0.5, seed=i)) for i, out in enumerate(outs)]
    parts = [part for each in held for part in each.values()]
    x = normal(300, dim, seed=7).bfloat16().requires_grad_()
    a = [normal(16, dim, scale=dim**-0.5, seed=8).requires_grad_() for _ in outs]
    b = [normal(out, 16, scale=0.1, seed=9).requires_grad_() for out in outs]
    project = torch.compile(frozen_lora_project, fullgraph=True) if compiled else frozen_lora_project

    def gradients(y, x):
        return y, *torch.autograd.grad(
            (y.double() * torch.sin(torch.arange(y.shape[1], device="cuda"))).sum(), (x, *a, *b)
        )

    ours = gradients(project(x, parts, form, a, b, 2.0), x)
    wide = x.detach().double().requires_grad_()
    whole = [FORMATS[form].dequantize(*each.values(), torch.float32).double() for each in held]
    exact = torch.cat(
        [wide @ w.T + 2.0 * (wide @ i.double().T) @ o.double().T for w, i, o in zip(whole, a, b, strict=True)], -1
    )
    assert max(error(o, e) for o, e in zip(ours, gradients(exact, wide), strict=True)) < 2e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [300, 1024])
def test_products_in_fp8(tokens, rows, compiled):
    """A trained weight's three products and a frozen one's two, against those of the same rounded operands."""
    if not supported(torch.device("cuda")):
        pytest.skip("needs 8-bit products")
    x = normal(tokens, 512, seed=1).bfloat16().requires_grad_()
    weight = normal(768, 512, scale=512**-0.5, seed=2).bfloat16().requires_grad_()
    kept = FORMATS["fp8_turned"].quantize(weight.detach())

    def trained(x, weight):
        return fp8_linear(x.tanh(), weight, rows)

    def frozen(x, weight):
        return fp8_frozen_linear(x.tanh(), *kept.values(), rows)

    keep_in_graphs()
    for run, inputs in ((trained, (x, weight)), (frozen, (x,))):
        y = (torch.compile(run, fullgraph=True) if compiled else run)(x, weight)
        ours = y, *torch.autograd.grad(y, inputs, y.detach().sin())
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        exact = wide[0].tanh() @ wide[1].T
        exact = exact, *torch.autograd.grad(exact, wide[: len(inputs)], exact.detach().sin())
        # Two roundings to 3 bits of fraction, or 2 of a gradient; the inner gradient follows y's own error.
        assert max(error(o, e) for o, e in zip(ours, exact, strict=True)) < 0.1


def test_a_compiled_cast_has_one_scale():
    """The largest number, 7.014, is 7 in bfloat16: a power of two times the largest that float8 e5m2 has."""
    a, b = (torch.full((8192, 256), value, device="cuda").bfloat16() for value in (1.015625, 6.90625))
    codes, scale = torch.compile(lambda a, b: cast(a * b, False, E5M2))(a, b)
    assert torch.equal((codes.float() * scale).unique(), torch.tensor([7.0], device="cuda"))
