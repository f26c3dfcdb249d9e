"""The held-out evaluation of a training run: loss on every named set, and answers compared with their reference."""

from collections.abc import Iterator
from typing import Any

import torch

from ftlib import data
from ftlib.errors import UserError
from ftlib.evaluation import exact_match, held_out
from ftlib.generation import Engine
from ftlib.layers.batch import Batch
from ftlib.models import LanguageModel
from ftlib.observe.said import Said, said
from ftlib.parallel.run import Run
from ftlib.tokenizers import Tokenizer


class Evaluation:
    """`evaluation(model)` -> `eval_loss` and, when asked for, `exact_match`; `answers` keeps the last ones given."""

    def __init__(self, cfg: Any, rows: data.Datasets, tokenizer: Tokenizer, run: Run, max_documents: int) -> None:
        """`cfg`: the recipe's, of which `eval`, `data` and `batch` are read; `max_documents`: the loader's."""
        self.cfg, self.sets, self.tokenizer, self.run = cfg, rows.eval, tokenizer, run
        self.max_documents = max_documents
        self.conversations = self._conversations() if cfg.eval.exact_match else []
        self.answers: list[exact_match.Answer] = []
        self.texts = all(source.format == "text" for source in rows.report.sources)
        self.said: list[str] = []  # to cfg.eval.prompts

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """One evaluation; every process must call it. Several sets: `eval_loss_<name>` for each besides their mean."""
        row: dict[str, float] = {}
        with torch.random.fork_rng():  # training must not depend on whether it was evaluated
            losses = {name: held_out.loss(model, self._batches(rows), self.run) for name, rows in self.sets.items()}
            if losses:
                targets = {name: rows.target_weights.sum().item() for name, rows in self.sets.items()}
                row["eval_loss"] = sum(losses[n] * targets[n] for n in losses) / sum(targets.values())
                if len(losses) > 1:
                    row |= {f"eval_loss_{name}": value for name, value in losses.items()}
            engine, limit = Engine(model, max_batch=64, compile="off"), self.cfg.eval.max_new_tokens
            if self.conversations:
                asked = [messages for _, messages in self.conversations]
                self.answers = exact_match.answer(engine, self.tokenizer, asked, limit)
                row["exact_match"] = exact_match.score(self.answers)
            if prompts := self.cfg.eval.prompts:
                self.said = exact_match.say(engine, self.tokenizer, prompts, limit, continued=self.texts)
        return row

    def samples(self) -> list[Said]:
        """What was said to `eval.prompts` and the first few of the last answers."""
        own = zip(self.cfg.eval.prompts, self.said, strict=False)
        found = [said(prompt, answer, "eval.prompts") for prompt, answer in own]
        for (name, _), one in zip(self.conversations, self.answers[: self.cfg.eval.samples], strict=False):
            found.append(said(one.prompt, one.given, name, one.expected))
        return found

    def _batches(self, rows: data.Documents) -> Iterator[Batch]:
        run, batch = self.run, self.cfg.batch
        return data.eval_batches(
            rows,
            self.cfg.data.seq_len,
            batch.micro_rows,
            self.tokenizer.pad_id or 0,
            run.data_rank,
            run.data_ranks,
            self.max_documents,
            None if self.cfg.data.pack else run.multiple,
        )

    def _conversations(self) -> list[tuple[str, list[dict]]]:
        """The first that end with an answer to something, each with the name of its set."""
        found = [(name, e.messages) for name, rows in self.sets.items() for e in rows.examples]
        asked = [(name, messages) for name, messages in found if exact_match.answered(messages)]
        if not asked:
            raise UserError(
                "no held-out row is a conversation that ends with an answer, so there is none to compare",
                where="eval.exact_match, data.eval",
                fix="set eval.exact_match=0; eval.prompts are answered beside any rows",
            )
        return asked[: self.cfg.eval.exact_match]
