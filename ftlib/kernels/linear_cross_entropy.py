"""Head projection and cross-entropy in one op: the logits of all tokens never exist at once."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

IGNORE = -100
TILE_BYTES = 1 << 28  # logits alive at a time; large tiles keep the matrix products efficient
TRAINED = 4  # times as many under a head that trains: each tile reads and writes all of its gradient, float32 [V, D]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    targets: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_group: ProcessGroup | None = None,
) -> Tensor:
    """Sum over targets of w * -log softmax(z)[label], a float32 scalar (float64 for float64 input).

    hidden [N, D]; weight [V, D]; labels [N] int64, -100 = no target; w is `weights` float32 [N], or 1; z = scale *
    hidden weight^T, then softcap * tanh(z / softcap) if given. Rows without a target are left out before the product;
    `targets`, their number, saves a wait for the device when it is known. Gradients are made in the forward pass, tile
    by tile, so each logit is computed once.

    `vocab_group`: processes that each hold a slice of V, all with the same hidden and labels; a `weight` sharded over
    the tensor-parallel axis brings its own. Each returns the whole sum. The gradient of `hidden` is then this process's
    part of a sum over the group, which belongs to whoever gathered `hidden` (ftlib.parallel.tensor).
    """
    vocab_group, weight = local_weight(weight, vocab_group)
    return _LinearCrossEntropy.apply(hidden, weight, labels, weights, targets, scale, softcap, vocab_group)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same sum through all logits at once: the oracle."""
    logits = hidden @ weight.T
    wide = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    each = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="none")
    return each.sum() if weights is None else (weights * each).sum()


def local_weight(weight: Tensor, group: ProcessGroup | None) -> tuple[ProcessGroup | None, Tensor]:
    """The group that shares a head's rows and this process's part of them; a sharded weight knows its own."""
    if not isinstance(weight, DTensor):
        return group, weight
    if weight.device_mesh.mesh_dim_names != ("tp",):
        raise ValueError("the head's weight is sharded over data ranks: run the model's forward first")
    return weight.device_mesh.get_group(), weight.to_local()


def target_rows(labels: Tensor, targets: int | None) -> Tensor | None:
    """Indices of rows with a target, ascending; None: all of them. Waits for the device only if `targets` is None."""
    if targets is None:
        return (labels != IGNORE).nonzero(as_tuple=True)[0]
    if targets == labels.numel():
        return None
    return torch.argsort((labels == IGNORE).to(torch.int8), stable=True)[:targets]


def tiles(rows: Tensor | None, count: int, size: int) -> Iterator[Tensor | slice]:
    """Indices of `count` rows, or slices when all rows are meant, at most `size` at a time."""
    if rows is not None:
        yield from rows.split(size)
        return
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def tile_rows(hidden: Tensor, weight: Tensor, group: ProcessGroup | None = None) -> int:
    """Rows whose logits fill a tile; where a group shares the vocabulary, with the two wide copies made of them."""
    copies = 0 if group is None else 2 * max(4, hidden.element_size())
    return max(1, tile_bytes(weight) // (weight.shape[0] * (hidden.element_size() + copies)))


def tile_bytes(weight: Tensor) -> int:
    """Logits alive at a time under this head."""
    return TILE_BYTES * (TRAINED if weight.requires_grad else 1)


def tile_reference(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Per-row -log softmax(z)[label], float32 [n] (float64 for float64 logits); `logits` is overwritten by d/d logits.

    logits [n, V] raw; labels int64 [n], every one a target. z = scale * logits, then softcap * tanh(z / softcap).
    """
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * scale
    slope = scale
    if softcap is not None:
        bent = torch.tanh(wide / softcap)
        wide, slope = softcap * bent, scale * (1 - bent * bent)
    lse = wide.logsumexp(-1, keepdim=True)
    nll = (lse - wide.gather(1, labels[:, None]))[:, 0]
    grad = (wide - lse).exp_()
    grad.scatter_add_(1, labels[:, None], grad.new_full((1, 1), -1.0).expand(len(labels), 1))
    logits.copy_(grad.mul_(slope))
    return nll


def tile_of_vocab(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, group: ProcessGroup
) -> Tensor:
    """`tile_reference` for logits [n, V / size] of this process's slice of the vocabulary; two small all-reduces."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * scale
    slope = scale
    if softcap is not None:
        bent = torch.tanh(wide / softcap)
        wide, slope = softcap * bent, scale * (1 - bent * bent)
    at = labels - group.rank() * logits.shape[1]
    here = (at >= 0) & (at < logits.shape[1])
    at = at.masked_fill(~here, 0)[:, None]
    top = wide.amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    grad = (wide - top).exp_()
    target = wide.gather(1, at).masked_fill(~here[:, None], 0)
    sums = torch.cat((grad.sum(-1, keepdim=True), target), 1)
    dist.all_reduce(sums, group=group)
    total, target = sums.split(1, 1)
    grad /= total
    grad.scatter_add_(1, at, -here.to(grad.dtype)[:, None])
    logits.copy_(grad.mul_(slope))
    return (top + total.log() - target)[:, 0]


def tile_function(
    device: torch.device, group: ProcessGroup | None
) -> Callable[[Tensor, Tensor, float, float | None], Tensor]:
    """`tile_reference`, or what computes the same on this device, or with these processes."""
    if group is not None:
        return partial(tile_of_vocab, group=group)
    if device.type != "cuda":
        return tile_reference
    from ftlib.kernels.cross_entropy_triton import tile_triton  # Triton is there where there is a GPU

    return tile_triton


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. On a GPU inside the product, whose sums are as wide as `total` already."""
    if total.dtype != a.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, D] times a wide factor [] or [N, 1], rounded to `dtype` once; no wide copy of x is made on the way.

    A factor rounded to bfloat16 before it is applied would be off by up to 0.4 % for all gradients below the head.
    """
    return torch.mul(x, factor.expand(len(x), 1), out=torch.empty_like(x, dtype=dtype))


def by_row(x: Tensor, factor: Tensor | None) -> Tensor:
    """x [n, D] times a wide factor [n], or x itself without one."""
    return x if factor is None else scaled(x, factor[:, None], x.dtype)


class TiledSum(torch.autograd.Function):
    """Base of sums over the rows of a head that have a target; their gradients are made in the forward pass.

    A subclass's `forward(ctx, hidden, weight, …)` gives what `add_up` returns.
    """

    @staticmethod
    def add_up(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        targets: int | None,
        size: int,
        differentiate: Callable[[Tensor, Tensor | slice], tuple[Tensor, Tensor | None, Tensor | None]],
    ) -> Tensor:
        """The sum, float32 (float64 for float64 input), over tiles of at most `size` rows.

        `differentiate(hidden weight^T of the rows, rows)`: their part of it, and that part's gradient in the logits
        [n, V], in their dtype; it may overwrite them, and give None where nothing needs a gradient. Then what the
        gradient of each row is to be multiplied with, wide [n], or None: a factor that is rounded into the logits'
        gradients, most of them at the label about -1, would be off for all that is below alike.
        """
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for rows in tiles(target_rows(labels, targets), labels.numel(), size):
            x = hidden[rows]
            part, grad, factor = differentiate(x @ weight.T, rows)
            total += part
            if need_hidden:
                grad_hidden[rows] = by_row(grad @ weight, factor)
            if need_weight:
                _add_product(grad_weight, grad.T, by_row(x, factor))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = scaled(grad_hidden, grad_total, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = scaled(grad_weight, grad_total, ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * (len(ctx.needs_input_grad) - 2)


class _LinearCrossEntropy(TiledSum):
    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        targets: int | None,
        scale: float,
        softcap: float | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        tile = tile_function(hidden.device, group)

        def differentiate(logits: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor | None]:
            nll = tile(logits, labels[rows], scale, softcap)  # the logits now hold their gradient
            if weights is None:
                return nll.sum(), logits, None
            return (nll * weights[rows]).sum(), logits, weights[rows].to(nll.dtype)

        return TiledSum.add_up(ctx, hidden, weight, labels, targets, tile_rows(hidden, weight, group), differentiate)
