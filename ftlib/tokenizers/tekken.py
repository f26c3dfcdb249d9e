"""tekken.json, Mistral's rank file: it says its split pattern, and its special tokens come before the ranks."""

import base64
import json
from pathlib import Path
from typing import NamedTuple

from ftlib.errors import UserError

TEKKEN_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Of files from before they were listed in the file itself.
_FIRST = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


class Tekken(NamedTuple):
    """`ranks` are ids less `first`; `special` are ids."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    pattern: str
    first: int


def read(path: Path) -> Tekken:
    """The vocabulary of a tekken.json, cut to the size that it declares. UserError if it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["config"]
        first = config["default_num_special_tokens"]
        size = config["default_vocab_size"] - first
        ranks = {base64.b64decode(v["token_bytes"]): v["rank"] for v in content["vocab"] if v["rank"] < size}
        listed = content.get("special_tokens") or [{"token_str": t, "rank": i} for i, t in enumerate(_FIRST)]
        special = {entry["token_str"]: entry["rank"] for entry in listed}
        taken = set(special.values())
        special |= {f"<SPECIAL_{i}>": i for i in range(first) if i not in taken}
        return Tekken(ranks, special, config["pattern"], first)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer cannot be read: {error!r}", where=str(path), fix="download it again") from None
