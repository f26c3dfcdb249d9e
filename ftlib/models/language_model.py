"""A decoder with its language-model head."""

import torch
from torch import Tensor, nn

from ftlib.layers.batch import Batch, Layout
from ftlib.layers.linear import Linear
from ftlib.models.arch import Arch
from ftlib.models.decoder import Decoder
from ftlib.models.keys import Table


class LanguageModel(nn.Module):
    """`model` (the decoder) and `lm_head`, named as Hugging Face names them.

    `table` maps parameter names to checkpoint keys; `config` is the config.json the model was built from.
    Training calls `model(batch)` for hidden states and hands them to a loss that never forms all logits.
    """

    def __init__(self, arch: Arch, table: Table, config: dict, decoder: type[nn.Module] = Decoder) -> None:
        super().__init__()
        self.arch, self.table, self.config = arch, table, config
        self.model = decoder(arch)
        self.lm_head = Linear(arch.dim, arch.vocab, bias=False)
        self.register_module("mtp", None)  # ftlib.models.mtp
        self.tie()

    def tie(self) -> None:
        """Share the embedding matrix with the head when the architecture does; again after parameters are replaced."""
        if self.arch.tied:
            self.lm_head.weight = self.model.embed_tokens._parameters["weight"]  # the base's, whatever adapter is on

    def forward(self, batch: Batch, embeds: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] after the last norm."""
        return self.model(batch, embeds)

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, vocab] of token ids [B, T]; every row is one document."""
        rows, length = input_ids.shape
        device = input_ids.device
        cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
        batch = Batch(
            input_ids=input_ids,
            labels=torch.full_like(input_ids, -100),
            position_ids=torch.arange(length, device=device).expand(rows, length),
            layout=Layout.packed(cu_seqlens, max_seqlen=length, shape=(rows, length)),
            target_tokens=0,
        )
        return self.head(self(batch))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., D]. For training use ftlib.losses, which works in tiles."""
        logits = self.lm_head(hidden)
        if self.arch.logit_scale != 1.0:
            logits = logits * self.arch.logit_scale
        cap = self.arch.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def logit_terms(self) -> dict[str, float | None]:
        """What ftlib.losses and the head kernels need beside `lm_head.weight`: `scale` and `softcap`."""
        return {"scale": self.arch.logit_scale, "softcap": self.arch.logit_softcap}
