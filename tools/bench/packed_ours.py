"""Our contender on real documents: packed into rows of one length, by the step of recipes/lora_sft.py."""

import common
import documents
import numpy as np
import ours

import ftlib
from ftlib import optim
from ftlib.data.documents import Documents
from ftlib.data.packing import pack
from ftlib.losses.language_modelling import next_token_loss


def main() -> None:
    work = common.job()
    rows, length = work["rows"], work["seq_len"]
    steps = documents.read(work["documents"])[0][: work["steps"]]
    held = Documents.from_rows([document for step in steps for document in step])
    plans = [plan(step, number * len(step), rows, length) for number, step in enumerate(steps)]
    most = max(len(row) for packed in plans for row in packed)
    model, _, cfg = ours.build_model(work)
    optimizer = optim.build(model, cfg.optim)
    checks, seconds = [], []
    for number, packed in enumerate(plans):
        batch = held.batch(packed, length, 0, most)
        batch = batch.pin_memory() if common.DEVICE.type == "cuda" else batch
        if number == common.WARM:
            common.forget_peak()
        start = common.wait()
        batch = batch.to(common.DEVICE, non_blocking=True)
        loss = next_token_loss(
            model(batch), model.lm_head.weight, batch.labels, batch.target_tokens, **model.logit_terms
        )
        loss = loss / batch.target_tokens
        loss.backward()
        checks.append((loss.item(), optim.step(optimizer, None).item()))
        seconds.append(common.wait() - start)
    documents.report("ftlib", work, seconds, checks, {"ftlib": ftlib.__version__}, [rows * length] * len(plans))


def plan(step: documents.Rows, first: int, rows: int, length: int) -> list[list[int]]:
    """Which documents of a step, counted from `first`, share a row; rows left over are padding."""
    packs = pack(np.array([len(ids) for ids, _ in step]), length, 0, 0)
    return [[first + i for i in row] for row in packs] + [[] for _ in range(rows - len(packs))]


if __name__ == "__main__":
    main()
