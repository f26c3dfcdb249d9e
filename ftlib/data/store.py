"""Where tokenised documents are collected: in memory, or in the files of a cache folder that are then mapped."""

import dataclasses
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftlib.data.examples import Example
from ftlib.data.parts import Part, Weights

_COLUMNS = {"lengths": np.int32, "targets": np.int32, "hashes": np.uint64, "lines": np.int32, "file_ids": np.int32}
Pieces = tuple[float, float, float]  # tokens of the prompt, of the first answer, and a number (ftlib.data.preference)
_BINARIES = ("input_ids.bin", "trained.bin", "weights.bin")
_FLUSH = 1 << 22  # tokens kept before they are written


class MemoryWriter:
    """Collects documents; `finish` gives the Part. Subclassed by the one that writes files."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self._columns = {name: array("Q" if dtype is np.uint64 else "i") for name, dtype in _COLUMNS.items()}
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._weighted, self._sums = array("q"), array("d")  # documents with weights, and the sums over their targets
        self._held = 0
        self._digests = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self.examples: list[Example] = []
        self._pieces = array("d")

    def add(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        file_id: int,
        line: int,
        example: Example | None,
        pieces: Pieces | None = None,
    ) -> None:
        """One document: ids int32 [n], mask bool or float [n]; all of a writer's documents have `pieces`, or none."""
        if trained.dtype != bool:
            trained = self._weigh(np.asarray(trained, np.float32))
        hashed = int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")
        # Nothing predicts a document's first token.
        entry = (len(ids), int(trained[1:].sum()), hashed, line, file_id)
        for column, value in zip(self._columns.values(), entry, strict=True):
            column.append(value)
        self._ids.append(ids)
        self._trained.append(trained)
        self._held += len(ids)
        self._pieces.extend(pieces or ())
        if example is not None:
            self._keep(example)
        if self._held >= _FLUSH:
            self._flush()

    def finish(self) -> Part:
        """The documents so far."""
        values = np.concatenate([np.empty(0, np.float32), *self._weights])
        self._digests[2].update(values)
        ids = np.concatenate([np.empty(0, np.int32), *self._ids])
        trained = np.concatenate([np.empty(0, bool), *self._trained])
        self._digests[0].update(ids)
        self._digests[1].update(trained)
        kept = {"examples": self.examples or None, "weights": _weights(self._weights_index(), values)}
        return Part(ids, trained, **self._arrays(), files=self.files, digest=self._digest(), **kept)

    def _weigh(self, weights: np.ndarray) -> np.ndarray:
        """The mask of a document's weights, which are kept where one is neither 0 nor 1."""
        trained = weights != 0
        if (weights != trained).any():
            self._weighted.append(len(self._columns["lengths"]))
            self._sums.append(weights[1:].sum(dtype=np.float64))
            self._weights.append(weights)
        return trained

    def _keep(self, example: Example) -> None:
        self.examples.append(example)

    def _flush(self) -> None:
        """In memory there is nothing to write."""

    def _arrays(self) -> dict[str, np.ndarray]:
        columns = {name: np.array(self._columns[name], dtype) for name, dtype in _COLUMNS.items()}
        return columns | {"pieces": np.array(self._pieces).reshape(-1, 3) if self._pieces else None}

    def _weights_index(self) -> dict[str, np.ndarray]:
        """What tells whose the weights are; nothing where there are none."""
        if not self._weighted:
            return {}
        return {"weighted": np.array(self._weighted, np.int64), "weight_sums": np.array(self._sums, np.float64)}

    def _digest(self) -> str:
        parts = [digest.hexdigest() for digest in self._digests[:2]]
        parts.append(hashlib.sha256(np.array(self._columns["lengths"], np.int32)).hexdigest())
        if self._pieces:
            parts.append(hashlib.sha256(self._pieces).hexdigest())
        if self._weighted:
            parts += [self._digests[2].hexdigest(), hashlib.sha256(self._weighted).hexdigest()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


class FileWriter(MemoryWriter):
    """Writes tokens, masks and examples as they come: memory does not grow with them. Published by one rename."""

    def __init__(self, files: Sequence[str], folder: Path) -> None:
        super().__init__(files)
        self.folder = folder
        self._part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._opened = {name: (self._part / name).open("wb") for name in ("examples.jsonl", *_BINARIES[:2])}
        self._places = array("q")

    def _keep(self, example: Example) -> None:
        self._places.append(self._opened["examples.jsonl"].tell())
        self._opened["examples.jsonl"].write(json.dumps(dataclasses.asdict(example)).encode() + b"\n")

    def _flush(self) -> None:
        all_held = (self._ids, self._trained, self._weights)
        for name, digest, held in zip(_BINARIES, self._digests, all_held, strict=True):
            if held and name not in self._opened:  # weights, which most data have none of
                self._opened[name] = (self._part / name).open("wb")
            file = self._opened.get(name)
            for piece in held:
                piece = np.ascontiguousarray(piece)
                digest.update(piece)
                file.write(piece)
            held.clear()
        self._held = 0

    def publish(self, report: dict) -> Part:
        """Everything on disk under its final name, with the report of its source; opened again from there."""
        self._flush()
        for file in self._opened.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        arrays = {name: held for name, held in self._arrays().items() if held is not None} | self._weights_index()
        np.savez(self._part / "index.npz", **arrays, examples=np.array(self._places, np.int64))
        with open(self._part / "part.json", "w", encoding="utf-8") as file:
            json.dump({"digest": self._digest(), "report": report}, file)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._part.rename(self.folder)
        return read(self.folder, self.files)[0]

    def abandon(self) -> None:
        """Leave nothing behind."""
        for file in self._opened.values():
            file.close()
        shutil.rmtree(self._part, ignore_errors=True)


class _StoredExamples(Sequence[Example]):
    def __init__(self, file: Path, places: np.ndarray) -> None:
        self.file, self.places = file, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        with open(self.file, "rb") as file:
            file.seek(int(self.places[index]))
            fields = json.loads(file.readline())
        fields["trained"] = [[tuple(r) for r in t] if isinstance(t, list) else t for t in fields["trained"]]
        return Example(**fields)


def read(folder: Path, files: Sequence[str]) -> tuple[Part, dict]:
    """What `FileWriter` published there: the documents, mapped, and the report. OSError if it is not whole."""
    with open(folder / "part.json", encoding="utf-8") as file:
        about = json.load(file)
    with np.load(folder / "index.npz") as index:
        columns = {name: index[name] for name in _COLUMNS} | {"pieces": index.get("pieces")}
        places = index["examples"]
        weighted = {name: index[name] for name in ("weighted", "weight_sums") if name in index}
    tokens = int(columns["lengths"].sum(dtype=np.int64))
    own = int(columns["lengths"][weighted["weighted"]].sum(dtype=np.int64)) if weighted else 0
    kinds = zip(_BINARIES, (np.int32, bool, np.float32), (tokens, tokens, own), strict=True)
    ids, trained, values = (_mapped(folder / name, dtype, count) for name, dtype, count in kinds)
    kept = {
        "examples": _StoredExamples(folder / "examples.jsonl", places) if len(places) else None,
        "weights": _weights(weighted, values),
    }
    return Part(ids, trained, **columns, files=list(files), digest=about["digest"], **kept), about["report"]


def _mapped(file: Path, dtype: type, count: int) -> np.ndarray:
    """An array of a file, read when it is looked at. OSError if it is not whole."""
    if not count:
        return np.empty(0, dtype)
    if file.stat().st_size != count * np.dtype(dtype).itemsize:
        raise OSError(f"{file.parent} is damaged")
    return np.memmap(file, dtype, "r")


def _weights(index: dict[str, np.ndarray], values: np.ndarray) -> Weights | None:
    return Weights(index["weighted"], values, index["weight_sums"]) if index else None
