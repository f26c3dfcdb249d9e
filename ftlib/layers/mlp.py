"""Feed-forward layers: gated, and plain."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib.layers.linear import Linear, project


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), or down(act(up(x)))."""

    hidden: int
    act: str = "silu"
    bias: bool = False
    gated: bool = True


class FeedForward(nn.Module):
    """The module of an `Mlp`, over [..., D].

    `tile`: tokens computed at a time, and again in backward, so that gate, up and their product never exist for more of
    them (Bekman et al. 2025, arXiv 2506.13996, section 3.1.1); 0: all at once. The results are the same; gradients of
    the layer's parameters are summed tile by tile.
    """

    tile = 0
    whole: Callable[[Tensor], Tensor]  # all tokens at once

    def forward(self, x: Tensor) -> Tensor:
        if not 0 < self.tile < x.shape[:-1].numel():
            return self.whole(x)
        run = partial(checkpoint, self.whole, use_reentrant=False) if torch.is_grad_enabled() else self.whole
        return torch.cat([run(piece) for piece in x.flatten(0, -2).split(self.tile)]).view_as(x)


class GatedMlp(FeedForward):
    """The gated one."""

    def __init__(self, spec: Mlp, dim: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.gate_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.up_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.down_proj = Linear(spec.hidden, dim, bias=spec.bias)

    def whole(self, x: Tensor) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), x)
        (y,) = project((self.down_proj,), self.act(gate) * up)
        return y


class PlainMlp(FeedForward):
    """The one without a gate."""

    def __init__(self, spec: Mlp, dim: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.act]
        self.up_proj = Linear(dim, spec.hidden, bias=spec.bias)
        self.down_proj = Linear(spec.hidden, dim, bias=spec.bias)

    def whole(self, x: Tensor) -> Tensor:
        (up,) = project((self.up_proj,), x)
        (y,) = project((self.down_proj,), self.act(up))
        return y


def feed_forward(spec: Mlp, dim: int) -> FeedForward:
    """The module of `spec` for hidden states of `dim` channels."""
    return (GatedMlp if spec.gated else PlainMlp)(spec, dim)
