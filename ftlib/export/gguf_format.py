"""The container: GGUF version 3, keys and values first, then a table of tensors, then their data, aligned."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

ALIGNMENT = 32
# ggml's numbers for how a tensor is stored: name -> (number, elements of a block, bytes of a block).
STORED = {"f32": (0, 1, 4), "f16": (1, 1, 2), "q8_0": (8, 32, 34), "bf16": (30, 1, 2)}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: shape as PyTorch has it (rows first), how it is stored, and who gives its bytes."""

    name: str
    shape: tuple[int, ...]
    stored: str
    data: Callable[[], bytes]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        _, elements, width = STORED[self.stored]
        return int(np.prod(self.shape)) // elements * width


@dataclass(frozen=True)
class Unsigned:
    """A whole number that the format wants without a sign: 32 bits unless 64 are said."""

    value: int
    bits: int = 32


def write(file: BinaryIO, metadata: dict[str, Any], entries: list[Entry]) -> None:
    """Write a whole file; the data of one tensor is in memory at a time."""
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key) + _value(value))
    at = 0
    for entry in entries:
        file.write(_text(entry.name) + struct.pack("<I", len(entry.shape)))
        file.write(struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape)))
        file.write(struct.pack("<IQ", STORED[entry.stored][0], at))
        at += entry.size + -entry.size % ALIGNMENT
    file.write(bytes(-file.tell() % ALIGNMENT))
    for entry in entries:
        data = entry.data()
        if len(data) != entry.size:
            raise ValueError(f"{entry.name}: {len(data)} bytes where {entry.size} were promised")
        file.write(data)
        file.write(bytes(-len(data) % ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value after the number of its type."""
    if isinstance(value, list | tuple):
        kind, _ = _scalar(value[0]) if value else (8, b"")
        return struct.pack("<IIQ", 9, kind, len(value)) + _joined(value)
    kind, data = _scalar(value)
    return struct.pack("<I", kind) + data


def _joined(values: Iterable[Any]) -> bytes:
    return b"".join(_scalar(value)[1] for value in values)


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, Unsigned):
        return (4, struct.pack("<I", value.value)) if value.bits == 32 else (10, struct.pack("<Q", value.value))
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 5, struct.pack("<i", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    raise TypeError(f"GGUF has no type for {type(value).__name__}")
