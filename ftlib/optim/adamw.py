"""AdamW whose states have a precision of their own, and whose steps can be rounded stochastically."""

import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.errors import UserError
from ftlib.kernels.capability import FP8
from ftlib.optim.base import Group, Update
from ftlib.optim.lowbit import KINDS, SMALLEST, block_size, book, decode, encode, encode_moments, tables
from ftlib.optim.pieces import local, local_gradient, piece
from ftlib.optim.rounding import noise, to_bfloat16
from ftlib.sections import Optim

WIDE = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORGETS = ("adamw", "muon", "dion", "ademamix")  # whose second moments decay by optim.betas in the weights' dtype
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class AdamW(Update):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), computed in float32 whatever its states are kept in.

    `states`: fp32, bf16, or one of `lowbit.KINDS` for matrices of `lowbit.SMALLEST` numbers or more whose rows can be
    cut into blocks, and float32 for the rest; None: torch's own AdamW with states in the parameter's dtype. With
    `stochastic`, bfloat16 parameters are rounded stochastically. Each process has the states of its part of a
    parameter, in blocks that are the same on every mesh. On a GPU each parameter's step is one kernel, and nobody waits
    for the norm of the gradients: `gate`, set before `step`, is what they are multiplied by, and 1, or 0 where the step
    must change nothing; float [2] on their device.
    """

    gate: Tensor | None = None

    def __init__(
        self, groups: Iterable[Group], *, states: str | None = None, stochastic: bool = False, **defaults: Any
    ) -> None:
        super().__init__(groups, **defaults)
        self.states, self.stochastic = states, stochastic
        parameters = (p for group in self.param_groups for p in group["params"])
        self._number = {p: i for i, p in enumerate(parameters)}
        self._judged: Tensor | None = None  # the gate of the last step, until somebody has looked at it
        self._counted: list[Tensor] = []  # parameters whose steps went up with it

    @property
    def gated(self) -> bool:
        """Whether steps look at `gate`."""
        return self.states is not None or self.stochastic

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        self.settle()
        loss = super().step(closure)
        self._judged, self.gate = self.gate, None
        return loss

    def settle(self) -> None:
        if self._judged is not None and not self._judged[1]:
            for state in filter(None, map(self.state.get, self._counted)):
                state["step"] -= 1
        self._judged = None
        self._counted.clear()

    def update(self, group: Group) -> None:
        if not self.gated:
            self.adamw(group)
            return
        for p in self.stepped(group):
            self._one(p, group)

    def _one(self, p: Tensor, group: Group) -> None:
        state, block = self.state[p], self._block(p)
        if not state:
            state |= self._start(p, block)
        state["step"] += 1
        if self.gate is not None:
            self._counted.append(p)
        part = local(p.detach())
        if part.numel() == 0:
            return
        kind = self.states if block else ""
        slots = [local(state[name]) for name in state if name != "step"]
        slots = [(s.view(torch.float8_e4m3fn) if kind == "fp8" and s.dtype == torch.uint8 else s) for s in slots]
        place = self._place(p, state["step"]) if self.stochastic and p.dtype == torch.bfloat16 else None
        part = part.view(-1, block or part.shape[-1]) if part.ndim else part.view(1, 1)
        slots = [x.view(-1) if kind and i % 2 else x.view(len(part), -1) for i, x in enumerate(slots)]
        grad = local_gradient(p).reshape(part.shape).contiguous()  # as the kernel reads it
        move(part, grad, slots, kind, _terms(group, state["step"]), self.gate, place)

    def _block(self, p: Tensor) -> int:
        """Numbers in a block of this parameter's states; 0 where they are kept wide."""
        block = few_bits(p, self.states)
        return 0 if block and local(p).shape[-1] % block else block  # columns may be cut between processes

    def _start(self, p: Tensor, block: int) -> dict[str, Any]:
        """States of 0, with names that tell the kinds apart."""
        if not block:
            dtype = WIDE["fp32"] if self.states in KINDS else WIDE.get(self.states, p.dtype)
            return {"step": 0} | {name: torch.zeros_like(p, dtype=dtype) for name in MOMENTS}
        state = {"step": 0}
        for name, signed in MOMENTS.items():
            part = local(p.detach())
            zeros = torch.zeros(1, block, device=p.device)
            codes, scale = encode(zeros, self.states, signed, book(self.states, signed, p.device))
            blocks = *part.shape[:-1], part.shape[-1] // block
            codes = codes.view(torch.uint8).expand(*blocks, -1).flatten(-2).contiguous()
            state[f"{name}_{self.states}"] = _placed(codes, p)
            state[f"{name}_{self.states}_scale"] = _placed(scale.repeat(blocks), p)
        return state

    def _place(self, p: Tensor, step: int) -> tuple[int, int]:
        """What rounding depends on, int32: the place of the local part in the whole, and parameter and step."""
        first, stride = 0, 1
        for cut, size in zip(reversed(piece(p).index), reversed(p.shape), strict=True):
            first, stride = first + cut.start * stride, stride * size
        return _wrapped(first), _wrapped(zlib.crc32(f"{self._number[p]} {step}".encode()))


def _terms(group: Group, step: int) -> tuple[float, ...]:
    """What a step multiplies by: 1 - beta1, beta2, 1 - beta2, eps, the decay's factor, the step's length, the root of
    the second moment's bias."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    length, bias = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return 1 - beta1, beta2, 1 - beta2, group["eps"], 1 - lr * group["weight_decay"], length, bias


def move(
    p: Tensor, grad: Tensor, slots: Sequence[Tensor], kind: str, terms: Sequence[float], gate: Tensor | None,
    place: tuple[int, int] | None,
) -> None:  # fmt: skip
    """`move_reference`, on a GPU by a kernel; it finds the tables."""
    if p.is_cuda and p.dtype != torch.float64:
        from ftlib.kernels.adamw_triton import adamw_triton as by  # Triton is there where there is a GPU
    else:
        by = move_reference
    by(p, grad, slots, kind, tables(kind, p.device), terms, gate, place)


def move_reference(
    p: Tensor, grad: Tensor, slots: Sequence[Tensor], kind: str, tables: Sequence[Tensor | None],
    terms: Sequence[float], gate: Tensor | None, place: tuple[int, int] | None,
) -> None:  # fmt: skip
    """One step of AdamW, in place.

    p, grad [blocks, block], any rows where moments are kept wide. `slots`: codes [blocks, ...] and scales [blocks] of
    each moment in few bits (`kind`, with `lowbit.tables`), or (`kind` "") the moments themselves. `terms`: `_terms`;
    `gate` as `AdamW` has it, None: open; `place`: what stochastic rounding depends on, None without.
    """
    fresh, keep, fresh_sq, eps, shrink, length, bias = terms
    wide = torch.promote_types(p.dtype, torch.float32)
    goes = None if gate is None else gate[1] > 0
    g = grad.to(wide) if gate is None else grad.to(wide) * gate[0].to(wide)
    if kind:
        m, v = decode(*slots[:2], kind, tables[0]), decode(*slots[2:], kind, tables[1])
    else:
        m, v = (slot.to(wide) for slot in slots)
    m = m + (g - m) * fresh
    v = v * keep + g * g * fresh_sq
    moved = p.to(wide) * shrink - length * m / (v.sqrt() / bias + eps)
    if place is not None:
        first, key = (torch.tensor(n, dtype=torch.int32, device=p.device) for n in place)
        moved = to_bfloat16(moved, noise(first, p.shape, key))
    kept = encode_moments(m, v, kind, tables) if kind else (m, v)
    for x, value in zip((*slots, p), (*kept, moved), strict=True):
        _replace(x, value.to(x.dtype), goes)


def _replace(x: Tensor, value: Tensor, goes: Tensor | None) -> None:
    """`value` into `x` where `goes`, else nothing."""
    if x.dtype == torch.float8_e4m3fn:  # as bytes: there is no choice between such numbers
        x, value = x.view(torch.uint8), value.view(torch.uint8)
    x.copy_(value if goes is None else torch.where(goes, value, x))


def _placed(part: Tensor, p: Tensor) -> Tensor:
    """This process's `part` of a tensor that is split as p is, its rows of another length."""
    if not isinstance(p, DTensor):
        return part
    shape = (*p.shape[:-1], part.shape[-1] * p.shape[-1] // max(1, local(p).shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _wrapped(n: int) -> int:
    """The int32 with the low 32 bits of n."""
    return (n + (1 << 31)) % (1 << 32) - (1 << 31)


def few_bits(p: Tensor, states: str | None) -> int:
    """Numbers in a block of a parameter's states, 0 where they are kept wide."""
    fits = states in KINDS and p.ndim > 1 and p.numel() >= SMALLEST
    return block_size(p.shape[-1], states) if fits else 0


def note(model: nn.Module, cfg: Optim) -> list[str]:
    """What a run says of states in few bits: of how many matrices, as small ones are kept wide."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = sum(few_bits(p, cfg.states) > 0 for p in trained)
    if cfg.states not in KINDS or held == len(trained):
        return []
    return [f"optimizer: states of {held} of {len(trained)} parameters in {cfg.states}, of small ones in fp32"]


def check(model: nn.Module, cfg: Optim) -> None:
    """UserError for what the trained parameters or this machine's GPU have no use for."""
    trained = [p for p in model.parameters() if p.requires_grad]
    narrow = cfg.states == "bf16" or (cfg.states is None and any(p.dtype == torch.bfloat16 for p in trained))
    if narrow and cfg.name in FORGETS and cfg.betas[1] > 1 - 2**-8:
        warnings.warn(
            f"optim.betas: a second moment kept in bf16 forgets nothing with {cfg.betas[1]:g}, as a step's decay "
            f"is less than its last digit; set {'optim.states=fp32' if cfg.name == 'adamw' else 'dtype=fp32'}, or the "
            "second of optim.betas to 0.99 or less",
            stacklevel=2,
        )
    if cfg.rounding == "stochastic" and not any(p.dtype == torch.bfloat16 for p in trained):
        raise UserError(
            "stochastic rounding is for bf16 weights, and those that are trained are kept in fp32",
            where="optim.rounding, dtype",
            fix="set optim.rounding=nearest, or train the weights themselves in bf16 (recipes/full_sft.py, dtype=bf16)",
        )
    if cfg.states in KINDS and not any(few_bits(p, cfg.states) for p in trained):
        raise UserError(
            f"no matrix that trains has {SMALLEST:,} numbers or more, so nothing would be kept in {cfg.states}",
            where="optim.states",
            fix="leave it out",
        )
    if cfg.states == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8:
        raise UserError("this GPU has no fp8", where="optim.states", fix="set optim.states=int8, which is as small")
