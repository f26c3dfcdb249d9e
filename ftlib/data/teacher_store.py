"""A teacher's most likely tokens for every token of some documents, in files: made once, mapped from disk."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ftlib.data.documents import Documents
from ftlib.data.loader import eval_batches
from ftlib.data.packing import pack
from ftlib.errors import UserError
from ftlib.layers.batch import Batch

TopK = Callable[[Batch], tuple[Tensor, Tensor]]  # batch [B, T] -> ids and log-probabilities [B, T, k] on the CPU
ABOUT = "about.json"


def exists(folder: Path, about: dict[str, object]) -> bool:
    """Whether the folder holds what `about`, or the part of it that is known yet, describes; UserError if it holds
    something else."""
    if not (folder / ABOUT).is_file():
        return False
    found = json.loads((folder / ABOUT).read_text())
    if differs := sorted(key for key in about if found.get(key) != about[key]):
        raise UserError(
            f"{folder} was made with other settings ({', '.join(differs)})",
            where="distill.stored",
            fix="name another folder, or remove this one to have it made again",
        )
    return True


def make(folder: Path, documents: Documents, about: dict[str, object], top_k: TopK, k: int, seq_len: int) -> None:
    """Write `ids` int32 and `logprobs` float32 [tokens, k] of all documents, end to end in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *documents.lengths], dtype=np.int64)
    shape = (int(starts[-1]), k)
    kinds = {"ids": np.int32, "logprobs": np.float32}
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
        for name, kind in kinds.items()
    }
    packs = pack(documents.lengths, seq_len, 0, 0)
    for members, batch in zip(packs, eval_batches(documents, seq_len, 1, 0), strict=True):
        ids, logprobs = top_k(batch)
        at = 0
        for index in members:
            count = int(documents.lengths[index])
            place = slice(starts[index], starts[index] + count)
            files["ids"][place] = ids[0, at : at + count].to(torch.int32).numpy()
            files["logprobs"][place] = logprobs[0, at : at + count].float().numpy()
            at += count
    for file in files.values():
        file.flush()
    (folder / ABOUT).write_text(json.dumps(about))  # last: a folder that was cut off is made again


class TeacherStore:
    """Rows of what `make` wrote, laid out as the loader lays out documents."""

    def __init__(self, folder: Path, documents: Documents) -> None:
        self._starts = np.cumsum([0, *documents.lengths], dtype=np.int64)
        self._files = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "logprobs")]

    def rows(self, packs: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """ids int64 and log-probabilities float32, [rows * width, k], of rows of `width` tokens; zeros in padding."""
        found = []
        for file, kind in zip(self._files, (np.int64, np.float32), strict=True):
            out = np.zeros((len(packs), width, file.shape[1]), kind)
            for row, members in zip(out, packs, strict=True):
                at = 0
                for index in members:
                    start, stop = self._starts[index], self._starts[index + 1]
                    row[at : at + stop - start] = file[start:stop]
                    at += stop - start
            found.append(torch.from_numpy(out).flatten(0, 1))
        return found[0], found[1]
