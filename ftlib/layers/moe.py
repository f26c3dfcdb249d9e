"""Mixture of experts: a router picks a few of many feed-forward layers for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.kernels.grouped_linear import grouped_linear
from ftlib.layers.mlp import ACTIVATIONS, GatedMlp, Mlp
from ftlib.layers.shared_experts import Shared, SharedGate


@dataclass(frozen=True, kw_only=True)
class Moe:
    """`top_k` of `experts` gated feed-forward layers, each `hidden` wide, summed by their routing weights."""

    hidden: int
    experts: int
    top_k: int
    act: str = "silu"
    # A softmax over all experts of which the best count, or over the best alone; or a sigmoid of each logit, and those
    # count that are best with a correction added, as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    score: Literal["softmax", "softmax_of_top", "sigmoid"] = "softmax"
    renormalize: bool = True  # `softmax`, `sigmoid`: the chosen weights are scaled to sum to 1
    scale: float = 1.0  # `sigmoid`: times the chosen weights
    groups: int = 1  # `sigmoid`: experts come in as many groups, and a token goes to the best `top_groups` alone
    top_groups: int = 1
    shared: Shared | None = None  # what every token goes through besides
    clamp: float | None = None  # gpt-oss: gate at most this, up within it either way, x * sigmoid(1.702 x) * (up + 1)
    bias: bool = False  # on router and experts
    transposed: bool = False  # stacks are kept as [experts, in, out], as gpt-oss publishes them
    interleaved: bool = False  # rows of gate and up alternate

    @property
    def router(self) -> str:
        """What checkpoints call the router."""
        return "router" if self.score == "softmax_of_top" else "gate"


class Router(nn.Module):
    """Tokens [N, D] -> (experts int64 [N, k], weights [N, k], logits [N, E], the scores of each expert).

    `e_score_correction_bias` [E] (`sigmoid`) decides who is chosen and takes no part in the weights, hence has no
    gradient. It is float32 in a model of any dtype: scores differ by less than bf16 can tell apart.
    """

    def __init__(self, spec: Moe, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, dim))
        self.bias = nn.Parameter(torch.empty(spec.experts)) if spec.bias else None
        if spec.score == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(spec.experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.spec.score == "sigmoid":
            return self.by_sigmoid(x)
        logits = F.linear(x, self.weight, self.bias)
        if self.spec.score == "softmax_of_top":
            best, chosen = logits.topk(self.spec.top_k, -1)
            return chosen, best.softmax(-1, dtype=_wide(x)).to(x.dtype), logits
        best, chosen = logits.softmax(-1, dtype=_wide(x)).topk(self.spec.top_k, -1)
        if self.spec.renormalize:
            best = best / best.sum(-1, keepdim=True)
        return chosen, best.to(x.dtype), logits

    def by_sigmoid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.to(_wide(x)), self.weight.to(_wide(x)))
        scores = logits.sigmoid()
        chosen = self.in_groups(scores.detach() + self.e_score_correction_bias).topk(self.spec.top_k, -1).indices
        weights = scores.gather(1, chosen)
        if self.spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, (self.spec.scale * weights).to(x.dtype), logits

    def in_groups(self, scores: Tensor) -> Tensor:
        """Scores [N, E], -inf outside each token's `top_groups`: those whose two best experts score most together."""
        if self.spec.groups == 1:
            return scores
        grouped = scores.unflatten(1, (self.spec.groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(self.spec.top_groups, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moved as any module, but a change of dtype leaves the correction as it is."""
        before = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias.dtype != before.dtype:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self


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
        if spec.shared is not None:
            self.add_module(spec.shared.name, GatedMlp(Mlp(hidden=spec.shared.hidden, act=spec.act), dim))
            if spec.shared.gated:
                self.shared_expert_gate = SharedGate(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the router's logits [B * T, E]."""
        flat = x.flatten(0, -2)
        chosen, weights, logits = self.get_submodule(self.spec.router)(flat)
        y = self.experts(flat, chosen, weights)
        if self.spec.shared is not None:
            y = y + self.for_all(flat)
        return y.view_as(x), logits

    def for_all(self, x: Tensor) -> Tensor:
        """What the shared expert adds, [N, D]."""
        y = self.get_submodule(self.spec.shared.name)(x)
        return self.shared_expert_gate(x) * y if self.spec.shared.gated else y
