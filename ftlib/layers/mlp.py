"""Gated feed-forward layer."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    """The module of an `Mlp`, over [..., D].

    `tile`: tokens computed at a time, and again in backward, so that gate, up and their product never exist for more of
    them (Bekman et al. 2025, arXiv 2506.13996, section 3.1.1); 0: all at once. The results are the same; gradients of
    the layer's parameters are summed tile by tile.
    """

    tile = 0

    def __init__(self, spec: Mlp, dim: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.gate_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.up_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.down_proj = Linear(spec.hidden, dim, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not 0 < self.tile < x.shape[:-1].numel():
            return self.whole(x)
        run = partial(checkpoint, self.whole, use_reentrant=False) if torch.is_grad_enabled() else self.whole
        return torch.cat([run(piece) for piece in x.flatten(0, -2).split(self.tile)]).view_as(x)

    def whole(self, x: Tensor) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), x)
        (y,) = project((self.down_proj,), self.act(gate) * up)
        return y
