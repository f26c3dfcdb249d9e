"""Linear layers whose frozen weight is stored in fewer bits and made whole for each product, forward and backward."""

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ftlib.kernels.nf4 import Piece
from ftlib.layers.linear import Linear
from ftlib.models.shards import fill, local, unsharded
from ftlib.quant.formats import FORMATS


class FrozenWeight(nn.Module):
    """A matrix [out, in] in one of FORMATS: `shape`, `dtype` (of what `dequantize` gives), and buffers.

    A stack [..., out, in] is kept as one matrix below the other. Several processes share it in two ways, each of which
    leaves the values as they are in one process, for it is quantized whole: `shard` (tensor parallelism), and `spread`
    (FSDP2).
    """

    def __init__(self, shape: torch.Size, form: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.form, self.dtype = shape, form, dtype
        self.piece: Piece | None = None
        self.mesh: DeviceMesh | None = None  # of the processes that keep the other pieces
        self.flat: dict[str, tuple[torch.dtype, torch.Size]] = {}  # parts that are parameters, and what they are
        parts = FORMATS[form].empty((shape[:-1].numel(), shape[-1]), device)
        self.names, self.bits = tuple(parts), 8 * _bytes(parts.values()) / shape.numel()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.lost: Callable[[Tensor, Tensor], None] | None = None  # is given each matrix and what is kept of it

    @property
    def parts(self) -> list[Tensor]:
        """What FORMATS calls so, of the piece of this process. Collective outside of a forward where it is spread."""
        found = []
        for name in self.names:
            part = getattr(self, name)
            if name in self.flat:
                kind, shape = self.flat[name]
                part = unsharded(part).view(kind)[: shape.numel()].view(shape)
            found.append(part)
        return found

    @property
    def nbytes(self) -> int:
        """Of this process."""
        return _bytes(local(part) for part in (*self._buffers.values(), *self._parameters.values()))

    @property
    def block(self) -> int:
        """How many weights along the last dimension stay together."""
        return FORMATS[self.form].block

    def divides(self, dim: int, ways: int) -> bool:
        """Whether dimension `dim` can be cut in `ways` equal parts."""
        return self.shape[dim] % (ways * (self.block if dim == len(self.shape) - 1 else 1)) == 0

    @property
    def local_shape(self) -> torch.Size:
        """Of what this process keeps."""
        dim, _, length = self.piece or (0, 0, self.shape[0])
        return torch.Size((*self.shape[:dim], length, *self.shape[dim + 1 :]))

    def shard(self, dim: int, mesh: DeviceMesh) -> None:
        """Keep one of equal parts along dimension `dim`: each process of the one-dimensional `mesh` has its own."""
        length = self.shape[dim] // mesh.size()
        self.mesh, self.piece = mesh, (dim, mesh.get_local_rank() * length, length)
        for name, part in FORMATS[self.form].cut(self._buffers, self.shape, self.piece).items():
            self._buffers[name] = part.clone()

    def _save_to_state_dict(self, *_: object) -> None:
        """Nothing is: it is made from the base model at every start."""

    def spread(self) -> None:
        """Make what is as large as the matrix a flat parameter, for FSDP2 to share: its bytes in `dtype`, which then
        travel with the layer's other parameters."""
        for name in [name for name, part in self._buffers.items() if part.ndim > 1]:
            part = self._buffers.pop(name)
            self.flat[name] = part.dtype, part.shape
            self.register_parameter(name, nn.Parameter(_packed(part, self.dtype), requires_grad=False))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take over a whole matrix or stack: quantized on this object's device, and of that what is kept."""
        form = FORMATS[self.form]
        parts = form.quantize(weight.to(self._buffers["scales"].device).flatten(0, -2))
        if self.lost is not None:
            self.lost(weight, form.dequantize(*parts.values(), self.dtype))
        for name, part in (form.cut(parts, self.shape, self.piece) if self.piece else parts).items():
            target = getattr(self, name)
            fill(target, _packed(part, self.dtype) if name in self.flat else part)

    def dequantize(self) -> Tensor:
        """The matrix or stack; a DTensor where this process keeps a piece."""
        local = FORMATS[self.form].dequantize(*self.parts, self.dtype).view(self.local_shape)
        return local if self.mesh is None else DTensor.from_local(local, self.mesh, [Shard(self.piece[0])])


def _packed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of codes of one byte each as numbers of `dtype`, zeros behind them where they do not fill the last."""
    codes = part.flatten().view(torch.uint8)
    return F.pad(codes, (0, -len(codes) % dtype.itemsize)).view(dtype)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class OnFrozenWeight:
    """A layer whose matrix is kept as `base`; `weight` makes it whole, for whoever wants to look at it."""

    base: FrozenWeight

    @property
    def weight(self) -> Tensor:
        return self.base.dequantize()

    @weight.setter
    def weight(self, value: Tensor) -> NoReturn:
        raise AttributeError("a quantized weight is frozen")


class QuantizedLinear(OnFrozenWeight, Linear):
    """y = x W^T + b with W in few bits. `recomputed`: it is part of a block that backward computes again."""

    recomputed = False

    def __init__(self, linear: Linear, form: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight
        self.base = FrozenWeight(weight.shape, form, weight.device, weight.dtype)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        y = y if self.bias is None else y + self.bias
        return y if self.active is None else self.adapters[self.active](x, y, self)

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        return torch.ops.ftlib.frozen_linear(x, self.base.parts, self.base.form)


@torch.library.custom_op("ftlib::frozen_linear", mutates_args=())
def _frozen_linear(x: Tensor, parts: Sequence[Tensor], form: str) -> Tensor:
    return F.linear(x, FORMATS[form].dequantize(*parts, x.dtype))


@_frozen_linear.register_fake
def _(x: Tensor, parts: Sequence[Tensor], form: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(parts[0]))


@torch.library.custom_op("ftlib::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(grad: Tensor, parts: Sequence[Tensor], form: str, dim: int) -> Tensor:
    return grad @ FORMATS[form].dequantize(*parts, grad.dtype)


@_frozen_linear_backward.register_fake
def _(grad: Tensor, parts: Sequence[Tensor], form: str, dim: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], dim)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, parts, ctx.form = inputs
    ctx.save_for_backward(*parts)  # not the whole matrix: it is made again
    ctx.dim = x.shape[-1]


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    parts = list(ctx.saved_tensors)  # read once: recomputation makes them anew each time
    return torch.ops.ftlib.frozen_linear_backward(grad, parts, ctx.form, ctx.dim), [None] * len(parts), None


_frozen_linear.register_autograd(_backward, setup_context=_setup)
