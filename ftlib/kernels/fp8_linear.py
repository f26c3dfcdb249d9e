"""Matrix products in 8-bit floats, scaled as they come (Micikevicius et al. 2022, arXiv 2209.05433).

Operands are divided by a scale that makes their largest magnitude the format's, rounded and multiplied; the result is
scaled back. `rows`: a scale for each row of either operand, along which a product sums, always e4m3; else one for each
tensor, a power of two, gradients in e5m2. PyTorch operations and nothing else, so that a compiler fuses the casts with
what is before them; without a GPU the products are those of the rounded operands in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-12  # zeros have a scale too
MULTIPLE = 16  # what the matrix units want of every size but the rows of the left operand


def cast(x: Tensor, rows: bool, kind: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """x [N, K] -> codes [N, K] of dtype `kind`, scales float32 [N, 1] (`rows`) or [1, 1]: x is about codes * scales.

    Codes lie row by row, as products want them, also where x does not: a compiler writes them so as it rounds, and no
    copy of bytes that lie the other way follows.
    """
    size = x.float().abs()  # compiled code still has what it stores in half precision, and would have two largest
    if rows:
        scales = size.amax(1, keepdim=True).clamp_min(TINY) / torch.finfo(kind).max
    else:
        scales = power_of_two(size.amax().view(1, 1), kind)
    return encode(x, scales, kind).contiguous(), scales


def power_of_two(largest: Tensor, kind: torch.dtype) -> Tensor:
    """The smallest power of two, float32, by which magnitudes up to `largest` (float32) can be divided to fit `kind`.

    What is coded so and made whole again is coded alike a second time, in any dtype as wide as bfloat16. NaN stays NaN.
    """
    bits = (largest.clamp_min(TINY) / torch.finfo(kind).max).view(torch.int32)
    power = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(largest.isnan(), largest, power)


def encode(x: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    """x over its scales, rounded to the nearest number of dtype `kind`."""
    largest = torch.finfo(kind).max
    return (x.float() / scales).clamp(-largest, largest).to(kind)


@torch.library.custom_op("ftlib::fp8_product", mutates_args=())
def product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, fast: bool = True
) -> Tensor:
    """(a * a_scales) (b * b_scales)^T in `dtype`: codes a [N, K], b [M, K], scales as `cast` gives them.

    `fast`: sums may be kept in fewer bits than float32's. An operator of its own: a compiler may choose the strides of
    what it hands to a library, and does not choose those that the matrix units want.
    """
    if not _native(a):
        return ((a.float() * a_scales) @ (b.float() * b_scales).T).to(dtype)
    out = torch.bfloat16 if a_scales.numel() > 1 else dtype  # all that is there for scales by row
    scales = {"scale_a": a_scales, "scale_b": b_scales.t()}
    a, b = a.contiguous(), b.contiguous().t()  # by rows and by columns: casts of transposed operands are neither
    return torch._scaled_mm(a, b, **scales, out_dtype=out, use_fast_accum=fast).to(dtype)


@product.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, fast: bool = True) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _native(x: Tensor) -> bool:
    return x.device.type == "cuda"


class _Trained(torch.autograd.Function):
    """x W^T where W is a parameter: three products a step, each with the scales its sum needs."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rows: bool) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return product(*cast(x, rows), *cast(weight, rows), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        rows, kind = ctx.rows, E4M3 if ctx.rows else E5M2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(*cast(grad, rows, kind), *cast(weight.t(), rows), x.dtype, False)
        if ctx.needs_input_grad[1]:
            short = -len(x) % MULTIPLE  # tokens are what is summed over here
            left, right = (F.pad(t.t(), (0, short)) for t in (grad, x))
            grad_weight = product(*cast(left, rows, kind), *cast(right, rows), weight.dtype, False)
        return grad_x, grad_weight, None


class _Frozen(torch.autograd.Function):
    """x W^T where W is kept as codes with a scale a row. Backward folds these scales into the gradient, so that it sees
    the very matrix that forward did."""

    @staticmethod
    def forward(
        ctx, x: Tensor, codes: Tensor, scales: Tensor, turned: Tensor | None, rows: bool  # noqa: ANN001
    ):  # fmt: skip
        ctx.save_for_backward(codes, scales, turned)
        ctx.rows = rows
        if rows:
            return product(*cast(x, True), codes, scales[:, None], x.dtype)
        one = torch.ones(1, 1, device=x.device)
        return (product(*cast(x, False), codes, one, x.dtype).float() * scales).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
        codes, scales, turned = ctx.saved_tensors
        turned = codes.t() if turned is None else turned
        one = torch.ones(turned.shape[0] if ctx.rows else 1, 1, device=grad.device)
        kind = E4M3 if ctx.rows else E5M2
        grad_x = product(*cast(grad.float() * scales, ctx.rows, kind), turned, one, grad.dtype, False)
        return grad_x, None, None, None, None


def keep_in_graphs() -> None:
    """Call it before either of these is compiled: torch 2.11, asked to look inside, gives some inputs no gradient.

    Not done where they are defined: it imports the compiler, a third of what starting a program here takes.
    """
    for function in (fp8_linear, fp8_frozen_linear):
        torch.compiler.allow_in_graph(function)


def fp8_linear(x: Tensor, weight: Tensor, rows: bool) -> Tensor:
    """x W^T [N, out] of x [N, in] and a parameter [out, in], whose sizes are multiples of 16; also its gradients."""
    return _Trained.apply(x, weight, rows)


def fp8_frozen_linear(x: Tensor, codes: Tensor, scales: Tensor, turned: Tensor | None, rows: bool) -> Tensor:
    """x W^T [N, out] of x [N, in] and the frozen W = codes * scales: e4m3 [out, in], float32 [out].

    `turned`: the codes transposed, [in, out], which backward needs; None: made there. Without `rows` x has one scale; W
    keeps those of its rows.
    """
    return _Frozen.apply(x, codes, scales, turned, rows)
