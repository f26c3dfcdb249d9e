"""Low precision: weights of a frozen base in fewer bits, products in 8-bit floats."""

from ftlib.quant.convert import hold, kept_in, round_through
from ftlib.quant.experts import QuantizedExperts
from ftlib.quant.formats import FORMATS
from ftlib.quant.frozen import FrozenWeight, QuantizedLinear
from ftlib.quant.qat import at
from ftlib.quant.setup import attach, check, commands, note

__all__ = [
    "FORMATS", "FrozenWeight", "QuantizedExperts", "QuantizedLinear", "at", "attach", "check", "commands",
    "hold", "kept_in", "note", "round_through",
]  # fmt: skip
