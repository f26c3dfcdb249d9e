"""AdamW whose states have a precision of their own, and whose steps can be rounded stochastically."""

import warnings
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.errors import UserError
from ftlib.kernels.capability import FP8
from ftlib.optim.base import Group, Update
from ftlib.optim.lowbit import KINDS, SMALLEST, block_size, book, decode, encode
from ftlib.optim.pieces import local, local_gradient, piece
from ftlib.optim.rounding import noise, to_bfloat16
from ftlib.sections import Optim

WIDE = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = 256  # columns that numbers without blocks are given: a compiler reads several at once where it knows of many
FORGETS = ("adamw", "muon", "dion", "ademamix")  # whose second moments decay by optim.betas in the weights' dtype
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class AdamW(Update):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), computed in float32 whatever its states are kept in.

    `states`: fp32, bf16, or one of `lowbit.KINDS` for matrices of `lowbit.SMALLEST` numbers or more whose rows can be
    cut into blocks, and float32 for the rest; None: torch's own AdamW with states in the parameter's dtype. With
    `stochastic`, bfloat16 parameters are rounded stochastically. Each process has the states of its part of a
    parameter, in blocks that are the same on every mesh. On a GPU each parameter's step is compiled, and nobody waits
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
        self._packed = 2 if states == "int4" else 1  # codes in a byte
        self._known: dict[tuple, Tensor] = {}  # scalars of this step, on their device
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
        rounds = self.stochastic and p.dtype == torch.bfloat16
        move = mover(kind, block, rounds, p.is_cuda)
        books = [book(kind, signed, part.device) for signed in MOMENTS.values()] if kind else []
        where = self._where(p, state["step"]) if rounds else []
        plain = (-1, 1 if part.numel() % WIDTH else WIDTH)
        shapes = [(-1, block), (-1, block // self._packed), (-1,)] if kind else [plain] * 3
        slots = [x.view(shapes[1 + i % 2]) for i, x in enumerate(slots)]
        grad = local_gradient(p).reshape(shapes[0])
        terms = self._terms(group, state["step"], p)
        gate = self._open(terms) if self.gate is None else self.gate.to(terms)
        move(part.view(shapes[0]), grad, slots, books, terms, gate, where)

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
            codes = codes.view(torch.uint8).repeat(part.numel() // block, 1)
            state[f"{name}_{self.states}"] = _placed(codes.view(*part.shape[:-1], part.shape[-1] // self._packed), p)
            scales = scale.repeat(part.numel() // block).view(*part.shape[:-1], part.shape[-1] // block)
            state[f"{name}_{self.states}_scale"] = _placed(scales, p)
        return state

    def _terms(self, group: Group, step: int, p: Tensor) -> Tensor:
        """What a step multiplies by, one tensor on the device: as numbers they would be compiled in.

        1 - beta1, beta2, 1 - beta2, eps, the decay's factor, the step's length, the root of the second's bias.
        """
        (beta1, beta2), lr = group["betas"], group["lr"]
        length, bias = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
        terms = (1 - beta1, beta2, 1 - beta2, group["eps"], 1 - lr * group["weight_decay"], length, bias)
        dtype = torch.promote_types(p.dtype, torch.float32)
        key = (terms, p.device, dtype)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            self._known[key] = torch.tensor(terms, dtype=dtype).to(p.device, non_blocking=True)
        return self._known[key]

    def _open(self, terms: Tensor) -> Tensor:
        """A gate that lets everything through, as it is."""
        key = (terms.device, terms.dtype)
        if key not in self._known:
            self._known[key] = terms.new_ones(2)
        return self._known[key]

    def _where(self, p: Tensor, step: int) -> list[Tensor]:
        """What rounding depends on, int32 scalars: the place of the local part in the whole, and parameter and step."""
        first, stride = 0, 1
        for cut, size in zip(reversed(piece(p).index), reversed(p.shape), strict=True):
            first, stride = first + cut.start * stride, stride * size
        key = zlib.crc32(f"{self._number[p]} {step}".encode())
        return [torch.full((), _wrapped(n), dtype=torch.int32, device=p.device) for n in (first, key)]


@cache
def mover(kind: str, block: int, stochastic: bool, compiled: bool) -> Callable[..., None]:
    """One step of AdamW, in place: `move(p, gradient, slots, books, terms, gate, where)`.

    p and gradient [blocks, block]. `slots` are codes and scales of each moment, for `kind` "" the moments themselves,
    in the shape of p; `AdamW` makes the other arguments.
    """

    def move(
        p: Tensor, grad: Tensor, slots: list[Tensor], books: list[Tensor], terms: Tensor, gate: Tensor,
        where: list[Tensor],
    ) -> None:  # fmt: skip
        fresh, keep, fresh_sq, eps, shrink, length, bias = terms.unbind()
        wide = torch.promote_types(p.dtype, torch.float32)
        scale, goes = gate[0], gate[1] > 0
        g = grad.to(wide) * scale
        if kind:
            m, v = decode(*slots[:2], kind, books[0]), decode(*slots[2:], kind, books[1])
        else:
            m, v = slots[0].to(wide), slots[1].to(wide)
        m = m + (g - m) * fresh
        v = v * keep + g * g * fresh_sq
        moved = p.to(wide) * shrink - length * m / (v.sqrt() / bias + eps)
        kept = (*encode(m, kind, True, books[0]), *encode(v, kind, False, books[1])) if kind else (m, v)
        for slot, value in zip(slots, kept, strict=True):
            _replace(slot, value, goes)
        _replace(p, to_bfloat16(moved, noise(where[0], p.shape, where[1])) if stochastic else moved, goes)

    if not compiled:
        return move
    # Each length of blocks, kind of states and of rounding: versions of one function, and past its limit this fails.
    torch._dynamo.config.recompile_limit = 64
    fused = torch.compile(move, fullgraph=True, dynamic=False)

    def run(p: Tensor, grad: Tensor, slots: list[Tensor], *rest: Any) -> None:
        for x in (p, grad, *slots):
            torch._dynamo.maybe_mark_dynamic(x, 0)  # compiled once for matrices of any size, with blocks of this one
        fused(p, grad, slots, *rest)

    return run


def _replace(x: Tensor, value: Tensor, goes: Tensor) -> None:
    """`value` into `x` where `goes`, else nothing."""
    value = value.to(x.dtype)
    if x.dtype == torch.float8_e4m3fn:  # as bytes: there is no choice between such numbers
        x, value = x.view(torch.uint8), value.view(torch.uint8)
    x.copy_(torch.where(goes, value, x))


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
