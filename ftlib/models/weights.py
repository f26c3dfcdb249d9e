"""Safetensors files of a model folder: every header checked before a byte of weights is read."""

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlib.errors import UserError

MAX_HEADER = 100_000_000  # bytes; the format's own limit
PRECISIONS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by their names in a header


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, as open to others as this user's files are: safetensors 0.8 keeps its own to the owner, and a
    shared folder would hold models that nobody else can load."""
    save_file(tensors, path, metadata={"format": "pt"})
    usual = path.with_name(f".{path.name}.mode")
    with open(usual, "wb") as file:
        path.chmod(os.fstat(file.fileno()).st_mode & 0o777)
    usual.unlink()


@dataclass
class Weights:
    """Checkpoint tensors by key: `files[key]` holds it, `shapes[key]` is its shape. Nothing is read until asked for."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    _open: dict[Path, safe_open] = field(default_factory=dict)

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        """`tensor[index]` of one key, reading only those bytes where the format allows it."""
        file = self.files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        if not index:
            return self._open[file].get_tensor(key)
        return self._open[file].get_slice(key)[index]


def open_folder(folder: Path) -> Weights:
    """All safetensors files of a model folder: those of its index, or every *.safetensors in it."""
    weights = Weights({}, {})
    for path in _paths(folder):
        for key, entry in _header(path).items():
            weights.files[key], weights.shapes[key] = path, tuple(entry["shape"])
    return weights


def precisions(folder: Path) -> dict[torch.dtype, int]:
    """How many numbers the files of a model folder hold in each floating precision that a model may have."""
    found = dict.fromkeys(PRECISIONS.values(), 0)
    for path in _paths(folder):
        for entry in _header(path).values():
            if entry["dtype"] in PRECISIONS:
                found[PRECISIONS[entry["dtype"]]] += math.prod(entry["shape"])
    return {dtype: count for dtype, count in found.items() if count}


def _paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = _indexed(folder, index)
    else:
        paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        fix = f"convert {pickles[0]} to safetensors; pickles can run code" if pickles else "download the weights"
        raise UserError(f"{folder} has no .safetensors file", fix=fix)
    return paths


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise UserError("the weight index is damaged", where=str(index), fix="download it again") from None
    paths = []
    for name in names:
        path = folder / name
        # Hub caches link files into a shared store, so the name is checked, not where a link leads.
        if Path(name).name != name:
            raise UserError(f"the weight index names a file outside its folder: {name!r}", where=str(index))
        if not path.exists():
            raise UserError(f"the weight index names {name}, which is missing", where=str(index), fix="download it")
        paths.append(path)
    return paths


def _header(path: Path) -> dict[str, dict]:
    """`shape` and `dtype` of each tensor of one file, after checking that the file is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        if start.startswith(b"version https://git-lfs"):
            raise UserError("this is a Git LFS pointer, not the file itself", where=str(path), fix="run `git lfs pull`")
        if start.lstrip()[:1] == b"<":
            raise UserError("this is an HTML page, not weights", where=str(path), fix="download the file again")
        length = struct.unpack("<Q", start[:8])[0] if size >= 8 else MAX_HEADER + 1
        if length > MAX_HEADER or 8 + length > size:
            raise UserError("no safetensors file, or cut off", where=str(path), fix="download it again")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError("the safetensors header is damaged", where=str(path), fix="download it again") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise UserError(f"expected {end:,} bytes, found {size:,}", where=str(path), fix="download the file again")
    return header


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating tensors in `dtype`, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
