"""A trained reward model as a reward: conversations scored in packed batches on the run's device, never trained."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftlib import build, tokenizers
from ftlib.data.packing import pack
from ftlib.errors import UserError, about
from ftlib.layers.batch import IGNORED, from_documents
from ftlib.models import heads, hub, load, own
from ftlib.models.load import DTYPES
from ftlib.parallel.run import Run

Messages = list[dict[str, Any]]
DOCUMENTS = 32  # at most in a packed row: batches keep their shapes from step to step


class RewardModel:
    """`model(prompts, completions)` -> a score for each completion, read at the last token of its conversation.

    It is what recipes/reward.py writes, or any `…ForSequenceClassification` with one output. The chat template and the
    tokenizer are those of its own folder, whatever the policy's are.
    """

    def __init__(self, cfg: Any, path: str, run: Run) -> None:
        self.model = build.frozen(cfg, run, path, heads.SEQUENCE)
        self.tokenizer = tokenizers.from_pretrained(hub.resolve(path))
        self.seq_len, self.rows, self.device = cfg.data.seq_len, cfg.batch.micro_rows, run.device

    @torch.no_grad()
    def __call__(self, prompts: list[Messages], completions: list[Messages]) -> list[float]:
        """One score a completion; both lists hold the messages of each."""
        pairs = zip(prompts, completions, strict=True)
        ids = [np.array(self.tokenizer.apply_chat_template([*asked, *said]), np.int32) for asked, said in pairs]
        seq_len = max(self.seq_len, *map(len, ids))
        packs = pack(np.array([len(own) for own in ids]), seq_len, 0, 0, DOCUMENTS)
        found = torch.empty(len(ids))
        for start in range(0, len(packs), self.rows):
            rows = packs[start : start + self.rows]
            found[[index for row in rows for index in row]] = self._score(ids, rows, seq_len)
        return found.tolist()

    def _score(self, ids: list[np.ndarray], rows: list[list[int]], seq_len: int) -> torch.Tensor:
        rows = rows + [[]] * (self.rows - len(rows))
        documents = [[(ids[index], np.full(len(ids[index]), IGNORED)) for index in row] for row in rows]
        batch = from_documents(documents, seq_len, self.tokenizer.filler_id, DOCUMENTS).to(self.device)
        sizes = [np.cumsum([len(ids[index]) for index in row], dtype=np.int64) for row in rows]
        ends = np.concatenate([number * seq_len + size - 1 for number, size in enumerate(sizes)])
        hidden = self.model(batch).flatten(0, 1)[torch.from_numpy(ends).to(self.device)]
        return F.linear(hidden, self.model.lm_head.weight).float()[:, 0].cpu()


def load_all(cfg: Any, run: Run) -> dict[int, RewardModel]:
    """The reward models of a config, by their place in `rewards`."""
    return {i: RewardModel(cfg, reward.model, run) for i, reward in enumerate(cfg.rewards) if reward.model is not None}


def check(cfg: Any) -> None:
    """UserError for a folder that holds no model that scores, or no way to write a conversation down."""
    for i, reward in enumerate(cfg.rewards):
        if reward.model is None:
            continue
        where = f"rewards[{i}].model"
        with about(where):
            folder = hub.resolve(reward.model)
            name = (hub.read_config(folder).get("architectures") or ["no model"])[0]
        if not name.endswith(heads.SEQUENCE.task):
            fix = f"name a …{heads.SEQUENCE.task}, such as recipes/reward.py writes of pairs"
            raise UserError(f"{name} gives no scores", where=where, fix=fix)
        decoder = own.decoder(cfg.model, reward.model)
        load.check_weights(load.build(folder, DTYPES[cfg.dtype], decoder, heads.SEQUENCE), folder)
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
        tokenizers.from_pretrained(folder).apply_chat_template(turns)
