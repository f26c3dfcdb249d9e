"""From a recipe's config to what its loop holds: model, tokenizer, rows, batches; and what is checked before."""

from ftlib.build.checks import check, check_model, check_rows, outline
from ftlib.build.fingerprints import fingerprint
from ftlib.build.models import backend, frozen, model
from ftlib.build.rows import check_data, datasets, loader, other_tokens, tokenizer, wanted

__all__ = [
    "backend", "check", "check_data", "check_model", "check_rows", "datasets", "fingerprint", "frozen", "loader",
    "model", "other_tokens", "outline", "tokenizer", "wanted",
]  # fmt: skip
