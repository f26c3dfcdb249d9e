"""How far a student's distributions are from a teacher's, tile by tile: neither's logits ever exist all at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.kernels.linear_cross_entropy import TiledSum, tile_rows
from ftlib.layers.batch import Batch
from ftlib.sections.distill import Distill

SLOTS = 8  # float32 copies of a tile that are alive while it is compared


def divergence(teacher: Tensor, student: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Of log-probabilities [..., V] of both, summed over V.

    `forward_kl`: sum p (log p - log q), p the teacher; `reverse_kl`: sum q (log q - log p) (Gu et al. 2023, arXiv
    2306.08543); `js`: beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv
    2306.13649, eq. 1).
    """
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    p, q = teacher.exp(), student.exp()
    log_m = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))  # not of p and q: both may be 0
    return (beta * p * (teacher - log_m) + (1 - beta) * q * (student - log_m)).sum(-1)


def over_top(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [n, V] at `ids` [n, k], and behind them that of all others together: [n, k + 1]."""
    top = logprobs.gather(-1, ids)
    return torch.cat((top, log_of_rest(top)), -1)


def log_of_rest(top: Tensor) -> Tensor:
    """log(1 - sum exp(top)) [n, 1], held above the dtype's smallest share."""
    rest = 1 - top.exp().sum(-1, keepdim=True)
    return rest.clamp(min=torch.finfo(top.dtype).eps).log()


@torch.no_grad()
def most_likely(model: nn.Module, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely next tokens of each position: ids and log-probabilities [B, T, k] on the CPU."""
    hidden = model(batch).flatten(0, 1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head, terms, found = model.lm_head.weight, model.logit_terms, []
    for part in hidden.split(max(1, tile_rows(hidden, head) // SLOTS)):
        found.append(_logprobs(part @ head.T, **terms, temperature=1.0, wide=wide).topk(min(k, head.shape[0]), -1))
    shape = (*batch.input_ids.shape, -1)
    pairs = [(top.indices, top.values) for top in found]
    ids, logprobs = (torch.cat(parts).view(shape).cpu() for parts in zip(*pairs, strict=True))
    return ids, logprobs


class Teacher:
    """What the teacher says of rows of a batch: `logprobs(rows, temperature)` and, for the student's, `view`."""

    def __init__(self, hidden: Tensor, head: Tensor, scale: float = 1.0, softcap: float | None = None) -> None:
        """From hidden states [N, D] and the head [V, D] of a model."""
        self.hidden, self.head, self.scale, self.softcap = hidden, head, scale, softcap

    def logprobs(self, rows: Tensor | slice, temperature: float, wide: torch.dtype) -> Tensor:
        """Of all tokens, [n, V]."""
        return _logprobs(self.hidden[rows] @ self.head.T, self.scale, self.softcap, temperature, wide)

    def view(self, student: Tensor, rows: Tensor | slice) -> Tensor:
        """The student's log-probabilities [n, V] of the outcomes that `logprobs` has."""
        return student


class StoredTeacher(Teacher):
    """The teacher's k most likely tokens of each position, [N, k] each; all others are one outcome."""

    def __init__(self, ids: Tensor, logprobs: Tensor) -> None:
        self.ids, self.top = ids, logprobs

    def logprobs(self, rows: Tensor | slice, temperature: float, wide: torch.dtype) -> Tensor:
        """Of the stored tokens and the rest, [n, k + 1]; temperature 1 only."""
        top = self.top[rows].to(wide)
        return torch.cat((top, log_of_rest(top)), -1)

    def view(self, student: Tensor, rows: Tensor | slice) -> Tensor:
        """The same outcomes of the student."""
        return over_top(student, self.ids[rows])


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: Teacher,
    labels: Tensor,
    cfg: Distill,
    *,
    weights: Tensor | None = None,
    targets: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum over targets of w ((1 - hard) * T^2 * divergence + hard * -log q(label)).

    float32, or float64 for float64 input. hidden [N, D] and head [V, D] of the student; labels int64 [N], -100 = no
    target; w is `weights` float32, as many, or 1. Gradients are made in the forward
    pass, for the student only. T^2 keeps gradients alike at any temperature (Hinton et al. 2015, arXiv 1503.02531).
    """
    if isinstance(head, DTensor):
        raise ValueError("a head that is split over processes cannot be distilled")

    own = None if weights is None else weights.flatten()

    def summed(values: Tensor, rows: Tensor | slice) -> Tensor:
        return values.sum() if own is None else (own[rows] * values).sum()

    def compare(logits: Tensor, rows: Tensor | slice) -> Tensor:
        at, wide = labels[rows][:, None], logits.dtype
        student = _logprobs(logits, scale, softcap, cfg.temperature, wide)
        theirs = teacher.logprobs(rows, cfg.temperature, wide)
        far = divergence(theirs, teacher.view(student, rows), cfg.divergence, cfg.beta)
        soft = summed(far, rows) * cfg.temperature**2
        if not cfg.hard:
            return soft
        plain = student if cfg.temperature == 1 else _logprobs(logits, scale, softcap, 1.0, wide)
        return (1 - cfg.hard) * soft - cfg.hard * summed(plain.gather(1, at)[:, 0], rows)

    return _Tiled.apply(hidden, head, labels, targets, compare)


def _logprobs(logits: Tensor, scale: float, softcap: float | None, temperature: float, wide: torch.dtype) -> Tensor:
    z = logits.to(wide) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


class _Tiled(TiledSum):
    """The sum of `compare(logits, rows)` over tiles of rows with a target; each tile is differentiated at once."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        targets: int | None,
        compare: Callable[[Tensor, Tensor | slice], Tensor],
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needed = any(ctx.needs_input_grad[:2])

        def differentiate(logits: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor | None, None]:
            logits = logits.to(wide)
            if not needed:
                return compare(logits, rows), None, None
            with torch.enable_grad():
                logits.requires_grad_()
                part = compare(logits, rows)
                (grad,) = torch.autograd.grad(part, logits)
            return part.detach(), grad.to(hidden.dtype), None

        size = max(1, tile_rows(hidden, weight) // SLOTS)
        return TiledSum.add_up(ctx, hidden, weight, labels, targets, size, differentiate)
