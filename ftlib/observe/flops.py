"""Useful floating-point work of one training token, and what devices can do: the two halves of MFU."""

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from torch import nn

from ftlib.adapters.saved_modules import Copies
from ftlib.layers.moe import Experts
from ftlib.optim import lisa

TERA = 1e12


class Peak(NamedTuple):
    """Dense bf16 FLOP/s of one device: the vendor's number, and a large matmul measured by us where we have one."""

    datasheet: float
    measured: float | None = None


# By a part of torch's device name, the more particular first.
PEAKS: tuple[tuple[str, Peak], ...] = (
    ("H100 PCIe", Peak(756 * TERA)),
    ("H100 NVL", Peak(835 * TERA)),
    ("H100", Peak(989 * TERA, 744 * TERA)),
    ("H200", Peak(989 * TERA)),
    ("B200", Peak(2250 * TERA)),
    ("A100", Peak(312 * TERA)),
    ("L40S", Peak(362 * TERA)),
    ("RTX A6000", Peak(155 * TERA)),
    ("RTX 4090", Peak(165 * TERA)),
    ("RTX 3090", Peak(71 * TERA)),
    ("MI300X", Peak(1307 * TERA)),
)


def device_peak(name: str) -> Peak | None:
    """Peak of a device by the name torch gives it (`torch.cuda.get_device_name()`), None if it is not in the table."""
    return next((peak for part, peak in PEAKS if part in name), None)


def count_weights(model: nn.Module) -> tuple[int, int]:
    """(frozen, trainable) weights that a token is multiplied with: matrices, but no embedding that is only looked up.

    Sharded, quantized and meta parameters count whole.
    Where an adapter trains a module whole, its copy counts and the base's weight does not. Of a mixture's experts, and
    of their adapters, the share counts that a token goes through.
    """
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    inside = {id(part) for module in lookups for part in module.modules()}
    others = [module for module in model.modules() if id(module) not in inside]
    replaced = {
        id(module) for module in others
        if getattr(module, "active", None) and isinstance(module.adapters[module.active], Copies)
    }  # fmt: skip
    used = {id(p) for module in others if id(module) not in replaced for p in module.parameters(recurse=False)}
    skipped = {id(p) for module in model.modules() for p in module.parameters(recurse=False)} - used
    asleep = {id(p) for p in lisa.asleep(model, 1)}
    shares: dict[int, Fraction] = {}
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        inside = (*experts.modules(), *experts.parameters())
        shares |= dict.fromkeys(map(id, inside), Fraction(experts.spec.top_k, experts.spec.experts))
    counts = [Fraction(0), Fraction(0)]
    for module in others:
        if hasattr(module, "base"):
            counts[0] += module.base.shape.numel() * shares.get(id(module), 1)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in skipped:
            trains = parameter.requires_grad and id(parameter) not in asleep
            counts[trains] += parameter.numel() * shares.get(id(parameter), 1)
    return round(counts[0]), round(counts[1])


def flops_per_token(frozen: int, trainable: int, attention: Iterable[tuple[int, int | None]], seq_len: int) -> float:
    """FLOP of forward and backward for one token: 4 a frozen weight, 6 a trainable one, plus causal attention.

    `attention` has (query heads x head size, window or None) of each layer; a query sees seq_len / 2 keys on average,
    fewer through a window. Work repeated by activation recomputation is not useful work and does not count.
    """
    scores = sum(12.0 * width * _keys_seen(seq_len, window) for width, window in attention)
    return 4.0 * frozen + 6.0 * trainable + scores


def _keys_seen(seq_len: int, window: int | None) -> float:
    span = seq_len if window is None else min(window, seq_len)
    return span - span * span / (2.0 * seq_len)
