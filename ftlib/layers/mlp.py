"""Gated feed-forward layer."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ftlib.layers.linear import Linear, project

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    hidden: int
    act: str = "silu"
    bias: bool = False


class GatedMlp(nn.Module):
    """The module of an `Mlp`."""

    def __init__(self, spec: Mlp, dim: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.gate_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.up_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.down_proj = Linear(spec.hidden, dim, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), x)
        (y,) = project((self.down_proj,), self.act(gate) * up)
        return y
