"""What the policy is compared with: log-probabilities of the same answers under the model that it started from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlib import data
from ftlib.adapters import lora
from ftlib.adapters.setup import reference_name
from ftlib.data import AnswerBatch, Preferences
from ftlib.errors import UserError
from ftlib.models import LanguageModel
from ftlib.parallel.run import Run
from ftlib.preference.answers import answer_logprobs
from ftlib.preference.objective import Objective

Reference = Callable[[LanguageModel, AnswerBatch], Tensor | None]  # -> log p of each answer, float32 [K]
FOLDER = "reference"
TRAIN = "train"


def kind(cfg: Any, objective: Objective) -> str:
    """`none`, `adapter_off` or `cache`, from a recipe's config with the sections `dpo` and `lora`."""
    if not objective.reference:
        return "none"
    if cfg.dpo.reference == "adapter_off" and cfg.lora is None:
        what, fix = "without adapters there is none to switch off", "set dpo.reference=cache"
        raise UserError(what, where="dpo.reference, lora", fix=fix)
    return ("cache" if cfg.lora is None else "adapter_off") if cfg.dpo.reference == "auto" else cfg.dpo.reference


def make(
    cfg: Any, objective: Objective, rows: data.Datasets, model: LanguageModel, run: Run, key: dict[str, Any]
) -> dict[str, Reference]:
    """The reference of the training rows, under `train`, and of each held-out set, under its name.

    Call it while the model is what it starts as. `key` is all that log-probabilities depend on beside the rows and the
    objective (`build.fingerprint`); those of a run that goes on are read from its folder.
    """
    sets: dict[str, Preferences] = {TRAIN: rows.train} | {f"eval_{name}": held for name, held in rows.eval.items()}
    how = kind(cfg, objective)
    if how == "cache":
        return {name: _cached(cfg, objective, name, held, model, run, key) for name, held in sets.items()}
    adapter = reference_name(cfg.lora) if how == "adapter_off" else None
    return dict.fromkeys(sets, switched(adapter, objective) if how == "adapter_off" else lambda model, batch: None)


def switched(adapter: str | None, objective: Objective) -> Reference:
    """The same weights with another adapter; None: with none at all.

    Called with gradients on, the blocks keep what backward would need although none follows: compiled code for
    training rounds differently from code for inference, and the first loss is to be ln 2 to the bit.
    """

    def reference(model: LanguageModel, batch: AnswerBatch) -> Tensor:
        with lora.use(model, adapter):
            hidden = model(batch)
        terms = {"length_alpha": objective.length_alpha, **model.logit_terms}
        with torch.no_grad():
            return answer_logprobs(hidden.detach(), model.lm_head.weight, batch.answers, **terms)

    return reference


def logprobs(model: LanguageModel, batch: AnswerBatch, objective: Objective) -> Tensor:
    """log p of each answer of a batch under the model as it is, float32 [K]."""
    terms = {"length_alpha": objective.length_alpha, **model.logit_terms}
    return answer_logprobs(model(batch), model.lm_head.weight, batch.answers, **terms)


@torch.no_grad()
def divergence(
    model: LanguageModel, batches: Iterable[AnswerBatch], reference: Reference, objective: Objective, run: Run
) -> Tensor:
    """Mean log p - log p_ref of the mismatched answers in `batches` of all processes, at least 0: what kto compares an
    answer with."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in batches:
        other = batch.mismatched.to(run.device, non_blocking=True)
        h = logprobs(model, other, objective) - reference(model, other)
        sums += torch.stack((h.double().sum(), sums.new_tensor(len(h))))
    total, count = run.total(sums)
    return (total / count.clamp(min=1)).clamp(min=0).float()


def _cached(
    cfg: Any, objective: Objective, name: str, rows: Preferences, model: LanguageModel, run: Run, key: dict[str, Any]
) -> Reference:
    about = [name, rows.fingerprint, rows.mismatched, objective.length_alpha, key]
    mark = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = Path(cfg.output_dir) / FOLDER / f"{name}_{mark}.safetensors"
    there = run.total(torch.tensor(float(file.is_file()), device=run.device)).item()
    if there == run.data_ranks:
        table = load_file(file)["logprobs"]
    else:
        table = compute(rows, objective, model, run, cfg.data.seq_len, cfg.batch.micro_rows).cpu()
        if run.is_main:
            _write(file, table)

    def reference(model: LanguageModel, batch: AnswerBatch) -> Tensor:
        return table[batch.answers.units.cpu()].flatten().to(batch.input_ids.device)

    return reference


@torch.no_grad()
def compute(
    rows: Preferences, objective: Objective, model: LanguageModel, run: Run, seq_len: int, micro_rows: int
) -> Tensor:
    """log p of every answer of every unit, float32 [n, answers], mismatched ones in n further rows. Collective."""
    shape = (len(rows) * (2 if rows.mismatched else 1), rows.answers)
    table, seen = (torch.zeros(shape, device=run.device) for _ in range(2))
    training = model.training
    model.eval()
    for batch in data.eval_batches(rows, seq_len, micro_rows, 0, run.data_rank, run.data_ranks):
        for part in (batch, batch.mismatched) if rows.mismatched else (batch,):
            part = part.to(run.device)
            table[part.answers.units] = logprobs(model, part, objective).view(-1, rows.answers)
            seen[part.answers.units] += 1
    model.train(training)
    table, seen = run.total(table), run.total(seen)
    if not bool((seen == 1).all()):
        raise RuntimeError("an answer has no reference, or two")  # never: each unit is in exactly one row
    return table


def _write(file: Path, table: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    save_file({"logprobs": table.contiguous()}, temporary)
    os.replace(temporary, file)
