"""The documents of packed.py as its contenders read them: steps of equally many, the longest of a step first."""

import json
from functools import cache
from pathlib import Path

import common
import numpy as np

Rows = list[tuple[np.ndarray, np.ndarray]]  # ids int32 [n], trained bool [n]
MICRO = 4  # batches that padded contenders make of a step, so that short documents are not filled up to the longest


@cache
def read(file: str | Path) -> tuple[list[Rows], dict]:
    """The documents of each step, and what the file says about itself. Read once: a contender asks three times."""
    with np.load(file) as arrays:
        about, lengths = json.loads(str(arrays["about"])), arrays["lengths"]
        ids, trained = arrays["ids"].astype(np.int32), arrays["trained"]
    ends = np.cumsum(lengths)
    cut = [(ids[end - length : end], trained[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    number = about["documents_per_step"]
    return [cut[at : at + number] for at in range(0, len(cut), number)], about


def dataset(work: dict):  # noqa: ANN201 - datasets.Dataset
    """All documents in order, prompts masked, for a trainer of peers."""
    from datasets import Dataset

    flat = [document for step in read(work["documents"])[0] for document in step]
    labels = [np.where(trained, ids, -100).tolist() for ids, trained in flat]
    return Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in flat], "labels": labels})


def settings(work: dict) -> dict:
    """SFTConfig's arguments that make a step of the same documents: side by side without padding, or filled up."""
    _, about = read(work["documents"])
    number = about["documents_per_step"]
    if work["padded"]:
        sizes = {"per_device_train_batch_size": number // MICRO, "gradient_accumulation_steps": MICRO}
        return {**sizes, "max_steps": work["steps"], "padding_free": False}
    sizes = {"per_device_train_batch_size": number, "gradient_accumulation_steps": 1}
    return {**sizes, "max_steps": work["steps"], "padding_free": True, "max_length": None}


def positions(step: Rows, work: dict) -> int:
    """Tokens of a step with the padding of a trainer of peers."""
    sizes = [len(ids) for ids, _ in step]
    if not work["padded"]:
        return sum(sizes)
    micro = len(sizes) // MICRO
    return sum(micro * max(sizes[at : at + micro]) for at in range(0, len(sizes), micro))


def report(
    name: str, work: dict, seconds: list[float], checks: list, versions: dict, places: list[int] | None = None
) -> None:
    """The row: real tokens a second, whatever `places`, the positions of each step, adds to them."""
    steps, about = read(work["documents"])
    steps = steps[: len(seconds)]
    real = [sum(len(ids) for ids, _ in step) for step in steps]
    places = places or [positions(step, work) for step in steps]
    more = {"real_tokens": real, "padding": round(1 - sum(real) / sum(places), 4), "documents": about}
    common.report(name, work, seconds, checks, versions, tokens=real, **more)
