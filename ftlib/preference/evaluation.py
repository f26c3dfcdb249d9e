"""The held-out evaluation of a preference run: its loss, and how often the better answer has the higher reward."""

from collections.abc import Iterator
from typing import Any

import torch

from ftlib import data
from ftlib.data import AnswerBatch, Preferences
from ftlib.models import LanguageModel
from ftlib.observe.said import Said
from ftlib.parallel.run import Run
from ftlib.preference.answers import policy_weights
from ftlib.preference.objective import FIGURES, Objective, figures
from ftlib.preference.reference import Reference, divergence, logprobs


class PreferenceEvaluation:
    """`evaluation(model)` -> `eval_loss`, `eval_accuracy`, `eval_margin`; of several sets, each under its name too."""

    def __init__(
        self,
        cfg: Any,
        rows: data.Datasets,
        objective: Objective,
        references: dict[str, Reference],
        run: Run,
        counters: dict[str, Any],
        max_documents: int,
    ) -> None:
        """`counters`: where the mean reward so far is kept (`running_mean`); `max_documents`: the loader's."""
        self.cfg, self.sets, self.objective, self.references = cfg, rows.eval, objective, references
        self.run, self.counters, self.max_documents = run, counters, max_documents

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """One evaluation; every process must call it."""
        training = model.training
        model.eval()
        found = {name: self._set(model, rows, self.references[f"eval_{name}"]) for name, rows in self.sets.items()}
        model.train(training)
        row: dict[str, float] = {}
        for key in ("eval_loss", "eval_accuracy", "eval_margin") if found else ():
            sizes = {name: len(rows) for name, rows in self.sets.items()}
            row[key] = sum(found[name][key] * size for name, size in sizes.items()) / sum(sizes.values())
            if len(found) > 1:
                row |= {f"{key}_{name}": numbers[key] for name, numbers in found.items()}
        return row

    def samples(self) -> list[Said]:
        """Nothing is generated."""
        return []

    @torch.no_grad()
    def _set(self, model: LanguageModel, rows: Preferences, reference: Reference) -> dict[str, float]:
        objective, run = self.objective, self.run
        baseline = self.counters.get("mean_reward", 0.0) if objective.shifted else 0.0
        if objective.mismatched:
            baseline = divergence(model, self._batches(rows), reference, objective, run)
        loss = torch.zeros((), dtype=torch.float64, device=run.device)
        sums = torch.zeros(len(FIGURES), 2, dtype=torch.float64, device=run.device)
        for batch in self._batches(rows):
            batch = batch.to(run.device)
            policy, weights = logprobs(model, batch, objective), None
            if objective.on_policy:
                terms = model.logit_terms
                weights = policy_weights(model(batch), model.lm_head.weight, batch.answers, **terms)
            values, more = objective(batch.answers, policy, reference(model, batch), baseline, weights)
            loss, sums = loss + values.sum(), sums + more
        numbers = figures(run.total(sums))
        return {
            "eval_loss": run.total(loss).item() / len(rows),
            "eval_accuracy": numbers["accuracy"],
            "eval_margin": numbers["margin"] or 0.0,
        }

    def _batches(self, rows: Preferences) -> Iterator[AnswerBatch]:
        run, cfg = self.run, self.cfg
        ranks = run.data_rank, run.data_ranks, self.max_documents, None if cfg.data.pack else run.multiple
        return data.eval_batches(rows, cfg.data.seq_len, cfg.batch.micro_rows, 0, *ranks)
