"""Scores of answers and steps: their loss over a batch, the held-out evaluation, and the model that is written."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlib import data, models
from ftlib.adapters.merge import merge_into
from ftlib.data import AnswerBatch, Preferences
from ftlib.losses.reward import bradley_terry, step_loss
from ftlib.models import LanguageModel
from ftlib.observe.said import Said
from ftlib.parallel.run import Run
from ftlib.preference.objective import better
from ftlib.sections import Reward
from ftlib.tokenizers import Tokenizer

FIGURES = ("accuracy", "margin", "mean_score")


def scores(model: LanguageModel, batch: AnswerBatch, cfg: Reward) -> Tensor:
    """Float32 scores [K] of answers, read at their last token; of steps, logits [S, 2] at their ends."""
    at = batch.answers.ends if cfg.kind == "pairs" else batch.answers.rows
    hidden, head = model(batch).flatten(0, 1)[at], model.lm_head
    # Not head(hidden): the head is sharded as one with the last norm, and whole from its forward on.
    found = F.linear(hidden, head.weight, head.bias).float()
    return found[:, 0] if cfg.kind == "pairs" else found


def loss(found: Tensor, batch: AnswerBatch, cfg: Reward) -> tuple[Tensor, Tensor]:
    """The loss of each pair or step, from `scores`, and sums for the log, detached [len(FIGURES) + 1]; the last one is
    their number. A tie, as all are while the head is 0, is one half of a right answer."""
    if cfg.kind == "steps":
        classes, right = batch.answers.targets, found.detach().argmax(1)
        correct = torch.where(found[:, 0] == found[:, 1], 0.5, (right == classes).to(found.dtype))
        sums = correct.sum(), (found.detach()[:, 1] - found.detach()[:, 0]).abs().sum(), right.sum()
        return step_loss(found, classes), _sums(sums, found)
    chosen, rejected = found.view(-1, 2).unbind(1)
    values = bradley_terry(chosen, rejected, batch.answers.values if cfg.margin else 0.0, cfg.centre)
    chosen, rejected = chosen.detach(), rejected.detach()
    sums = better(chosen, rejected).sum(), (chosen - rejected).sum(), (chosen + rejected).sum() / 2
    return values, _sums(sums, values)


def figures(sums: Tensor) -> dict[str, float]:
    """Means out of sums over any number of batches and processes."""
    *totals, count = sums.tolist()
    return {name: total / max(1, count) for name, total in zip(FIGURES, totals, strict=True)}


class RewardEvaluation:
    """`evaluation(model)` -> `eval_loss`, `eval_accuracy`, `eval_margin` over all held-out pairs or steps."""

    def __init__(self, cfg: Any, rows: data.Datasets, run: Run, max_documents: int) -> None:
        self.cfg, self.sets, self.run, self.max_documents = cfg, rows.eval, run, max_documents

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """One evaluation; every process must call it. Several sets: each under its name too."""
        training = model.training
        model.eval()
        found = {name: self._set(model, rows) for name, rows in self.sets.items()}
        model.train(training)
        row = self._numbers(sum(found.values()), "") if found else {}
        for name, sums in found.items() if len(found) > 1 else ():
            row |= self._numbers(sums, f"_{name}")
        return row

    def samples(self) -> list[Said]:
        """Nothing is generated."""
        return []

    @torch.no_grad()
    def _set(self, model: LanguageModel, rows: Preferences) -> Tensor:
        """Sum of the loss, then those of `loss`, over all processes."""
        cfg, run = self.cfg, self.run
        total = torch.zeros(len(FIGURES) + 2, dtype=torch.float64, device=run.device)
        place = run.data_rank, run.data_ranks, self.max_documents, None if cfg.data.pack else run.multiple
        for batch in data.eval_batches(rows, cfg.data.seq_len, cfg.batch.micro_rows, 0, *place):
            batch = batch.to(run.device)
            values, sums = loss(scores(model, batch, cfg.reward), batch, cfg.reward)
            total += torch.cat((values.sum()[None], sums))
        return run.total(total)

    @staticmethod
    def _numbers(sums: Tensor, name: str) -> dict[str, float]:
        known = figures(sums[1:])
        numbers = {"eval_loss": (sums[0] / sums[-1]).item(), "eval_accuracy": known["accuracy"]}
        return {f"{key}{name}": n for key, n in (numbers | {"eval_margin": known["margin"]}).items()}


def save(model: LanguageModel, tokenizer: Tokenizer, folder: Path, write: bool) -> None:
    """The whole model in Hugging Face's layout, adapters merged in. All processes of a sharded model must call this."""
    merge_into(model)
    model.config = model.config | {"pad_token_id": tokenizer.pad_id}
    models.save_pretrained(model, folder, write=write)
    if write:
        tokenizer.save(folder)


def _sums(values: tuple[Tensor, ...], like: Tensor) -> Tensor:
    return torch.stack([value.to(like.dtype) for value in (*values, like.new_tensor(len(like)))])
