"""Mixture of experts: a router picks a few of many feed-forward layers for each token."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.kernels.grouped_linear import grouped_linear
from ftlib.layers.mlp import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Moe:
    """`top_k` of `experts` gated feed-forward layers, each `hidden` wide, summed by their routing weights."""

    hidden: int
    experts: int
    top_k: int
    act: str = "silu"
    # A softmax over all experts of which the best count, or over the best alone.
    score: Literal["softmax", "softmax_of_top"] = "softmax"
    renormalize: bool = True  # `softmax`: the chosen weights are scaled to sum to 1
    clamp: float | None = None  # gpt-oss: gate at most this, up within it either way, x * sigmoid(1.702 x) * (up + 1)
    bias: bool = False  # on router and experts
    transposed: bool = False  # stacks are kept as [experts, in, out], as gpt-oss publishes them
    interleaved: bool = False  # rows of gate and up alternate

    @property
    def router(self) -> str:
        """What checkpoints call the router."""
        return "router" if self.score == "softmax_of_top" else "gate"


class Router(nn.Module):
    """Tokens [N, D] -> (experts int64 [N, k], weights [N, k], logits [N, E], the scores of each expert)."""

    def __init__(self, spec: Moe, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, dim))
        self.bias = nn.Parameter(torch.empty(spec.experts)) if spec.bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight, self.bias)
        if self.spec.score == "softmax_of_top":
            best, chosen = logits.topk(self.spec.top_k, -1)
            return chosen, best.softmax(-1, dtype=_wide(x)).to(x.dtype), logits
        best, chosen = logits.softmax(-1, dtype=_wide(x)).topk(self.spec.top_k, -1)
        if self.spec.renormalize:
            best = best / best.sum(-1, keepdim=True)
        return chosen, best.to(x.dtype), logits


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class ExpertLinear(nn.Module):
    """One linear layer per expert, their matrices stacked: `weight` [E, out, in], or [E, in, out] if `transposed`.

    `parts` > 1: `outputs` are that many layers' one after the other, and a dimension of `weight` and `bias` tells them
    apart ([E, parts, out / parts, in]), so that processes can share each of them.
    """

    active: str | None = None  # the adapter that is on (ftlib.adapters.experts)

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool, transposed: bool, parts: int = 1) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, inputs, outputs
        self.transposed, self.parts = transposed, parts
        rows = (outputs,) if parts == 1 else (parts, outputs // parts)
        self.weight = nn.Parameter(torch.empty(experts, *((inputs, *rows) if transposed else (*rows, inputs))))
        self.bias = nn.Parameter(torch.empty(experts, *rows)) if bias else None

    @property
    def matrices(self) -> Tensor:
        """The weight as [E, out, in], or [E, in, out] if `transposed`."""
        first = 2 if self.transposed else 1
        return self.weight if self.parts == 1 else self.weight.flatten(first, first + 1)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [N, in], sorted by expert, whose runs end at `ends` (int32 [E]). Returns [N, out]."""
        y = self.product(x, ends)
        return y if self.active is None else y + self.adapters[self.active](x, ends)

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """The same without an adapter."""
        weight = self.matrices.mT if self.transposed else self.matrices
        return grouped_linear(x, weight, ends, None if self.bias is None else self.bias.flatten(1))


class Experts(nn.Module):
    """All experts of a layer. Tokens are sorted by expert, so that each expert's are one run of rows."""

    def __init__(self, spec: Moe, dim: int) -> None:
        super().__init__()
        self.spec = spec
        parts = 1 if spec.interleaved else 2
        self.gate_up_proj = ExpertLinear(spec.experts, dim, 2 * spec.hidden, spec.bias, spec.transposed, parts)
        self.down_proj = ExpertLinear(spec.experts, spec.hidden, dim, spec.bias, spec.transposed)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, D]; chosen, weights [N, k]. Returns [N, D]."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        every = torch.arange(self.spec.experts, device=x.device)
        ends = torch.searchsorted(flat[order], every, right=True, out_int32=True)
        hidden = self.activate(self.gate_up_proj(x[order // chosen.shape[1]], ends))
        y = self.down_proj(hidden, ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return (y[back].unflatten(0, chosen.shape) * weights[..., None]).sum(1)

    def activate(self, gate_up: Tensor) -> Tensor:
        """[N, 2 hidden] -> [N, hidden]."""
        spec = self.spec
        gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if spec.interleaved else gate_up.chunk(2, -1)
        if spec.clamp is None:
            return ACTIVATIONS[spec.act](gate) * up
        gate, up = gate.clamp(max=spec.clamp), up.clamp(-spec.clamp, spec.clamp)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class MoeMlp(nn.Module):
    """The module of a `Moe`: router and experts, over [B, T, D]."""

    def __init__(self, spec: Moe, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.add_module(spec.router, Router(spec, dim))
        self.experts = Experts(spec, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the router's logits [B * T, E]."""
        flat = x.flatten(0, -2)
        chosen, weights, logits = self.get_submodule(self.spec.router)(flat)
        return self.experts(flat, chosen, weights).view_as(x), logits
