"""Rounding of a model's weights and activations to few bits."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the linear layers of the blocks are kept in the result, and computed."""

    scheme: Literal["int4", "int8_int4", "fp8"] = "int4"  # weights; int8_int4, fp8: and their inputs, token by token
    group: int | None = None  # int4, int8_int4: inputs of a layer that share a scale, 32; fp8 has one a row

    def __post_init__(self) -> None:
        if self.group is not None and self.scheme == "fp8":
            raise ValueError("group: is for int4 and int8_int4; fp8 has a scale a row, so leave it out")
        if self.inputs_a_scale < 8 or self.inputs_a_scale % 8:
            raise ValueError("group: must be a multiple of 8")

    @property
    def inputs_a_scale(self) -> int:
        """`group`, or its usual value."""
        return 32 if self.group is None else self.group


@dataclass(frozen=True, kw_only=True)
class Qat(Rounding):
    """Train with the layers rounded, so that rounding the result (recipes/quantize.py) changes nothing."""

    after: int = 0  # steps before it begins

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after < 0:
            raise ValueError("after: must not be negative")
