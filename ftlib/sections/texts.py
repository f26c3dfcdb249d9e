"""What is trained on where rows are text."""

from dataclasses import dataclass
from typing import Literal

from ftlib.sections.data import Data


@dataclass(frozen=True, kw_only=True)
class Texts(Data):
    """`Data` of texts, any part of which is worth reading: of a long one nothing is left out."""

    overlong: Literal["drop", "truncate", "split", "error"] = "split"  # documents longer than seq_len
