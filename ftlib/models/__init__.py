"""Language models in plain PyTorch: one decoder, families as data, Hugging Face folders in and out.

    model = from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16, device="cuda")
    logits = model.logits(input_ids)            # [B, T, vocab]
    save_pretrained(model, "my_model")
"""

from pathlib import Path

import torch

from ftlib.models import hub
from ftlib.models.language_model import LanguageModel
from ftlib.models.load import build, check_weights, load_weights
from ftlib.models.save import save_pretrained

__all__ = ["LanguageModel", "from_pretrained", "save_pretrained"]


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    decoder: type[torch.nn.Module] | None = None,
) -> LanguageModel:
    """A model with its weights. `path`: folder in Hugging Face layout, Hub id `org/name[@revision]`, or `ftlib:…`.

    `decoder`: your own class (`model.code` of a config) in place of the library's.
    Raises UserError when the architecture is not supported or the weights do not fit it.
    """
    folder = hub.resolve(path)
    model = build(folder, dtype, decoder)
    weights = check_weights(model, folder)
    model.to_empty(device=device)
    model.tie()
    load_weights(model, weights)
    model.source = folder
    return model.eval()
