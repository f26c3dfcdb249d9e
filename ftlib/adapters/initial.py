"""What the factors of an adapter are before training."""

import math

import torch
from torch import Tensor, nn

from ftlib.layers.linear import Linear
from ftlib.sections import Lora

FROM_WEIGHT = ("pissa", "olora")  # their B A is a part of W, which the layer has to subtract


def draw(
    init: str, linear: Linear, rank: int, scale: float, weight: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in float32. `weight` [out, in], whole, is needed by `pissa` and `olora` only.

    kaiming (the default everywhere) and gaussian: A is random, B is 0. pissa (Meng et al. 2024, arXiv 2404.02948):
    scale * B A is the best approximation of W of that rank, by a singular value decomposition. olora (Büyükakyüz 2024,
    arXiv 2406.01775): the first columns and rows of a QR decomposition.
    """
    if init in FROM_WEIGHT:
        return main_part(weight.float(), rank, scale) if init == "pissa" else _olora(weight.float(), rank)
    a = torch.empty(rank, linear.in_features, dtype=torch.float32)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(linear.out_features, rank)


def note(cfg: Lora | None) -> list[str]:
    """What a run says of a start inside W: how its adapter is written."""
    if cfg is None or cfg.init not in FROM_WEIGHT:
        return []
    what = f"adapter: lora.init={cfg.init} starts inside the weights, so final/ has twice the rank"
    return [f"{what} (lora.rank={cfg.rank}: {2 * cfg.rank}): the plain adapter that it equals on this base"]


def main_part(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with scale * B A nearest to `weight` of that rank."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()
