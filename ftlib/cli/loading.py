"""What `generate` and `merge` share: a model, its adapter and its tokenizer from what the user named. Imports torch."""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ftlib import models, quant, tokenizers
from ftlib.adapters import peft_format
from ftlib.errors import UserError
from ftlib.losses.diffusion import MASK
from ftlib.models import LanguageModel, heads, hub, own
from ftlib.models.load import DTYPES
from ftlib.models.weights import PRECISIONS, precisions
from ftlib.quant import FORMATS
from ftlib.tokenizers import Tokenizer


def chosen_dtype(name: str | None, device: str) -> torch.dtype:
    """The precision of a command's `--dtype`; without one bf16 on a GPU, float32 elsewhere."""
    return DTYPES[name or ("bf16" if device.startswith("cuda") else "fp32")]


def merged_dtype(name: str | None, base: Path) -> torch.dtype:
    """The precision that `tune merge` works and stores in: of its `--dtype`, without one `stored_dtype`."""
    return chosen_dtype(name, "cpu") if name else stored_dtype(base)


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision that most numbers in a model's files have; a note on stderr where others will be rounded to it.

    Of a quantized model it is what config.json says, and float32 where that says nothing.
    """
    config = hub.read_config(folder)
    packed = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    counts = {} if packed else precisions(folder)
    if not counts:
        name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
        return {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS.values()}.get(name, torch.float32)
    most = max(counts, key=lambda dtype: counts[dtype])
    for dtype, count in counts.items():
        if torch.promote_types(dtype, most) != most:
            said = f"{count:,} numbers of {folder} are {dtype} and are rounded to {most}, as the others are stored"
            print(f"note: {said}".replace("torch.", ""), file=sys.stderr)
    return most


def find(model: str, adapter: str | None) -> tuple[Path, Path | None]:
    """Folders of the base model and of the adapter (None without). `model` may itself be an adapter's folder."""
    if adapter is None and (Path(os.path.expanduser(model)) / "adapter_config.json").is_file():
        adapter = model
        config = peft_format.read_config(Path(os.path.expanduser(adapter)))
        model, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not model:
            raise UserError(f"{adapter} does not name its base model", fix=f"name it: MODEL --adapter {adapter}")
        model = f"{model}@{revision}" if revision else model
    if adapter is None:
        return hub.resolve(model), None
    folder = hub.resolve(adapter)
    peft_format.read_config(folder)  # what is no adapter is found before the base is loaded
    return hub.resolve(model), folder


class Named(NamedTuple):
    """What a verb's options name, and the folders that it came from."""

    model: LanguageModel
    tokenizer: Tokenizer
    device: str
    base: Path
    adapter: Path | None


def named(args: argparse.Namespace, masked: bool = False) -> Named:
    """By MODEL and the options --adapter, --code, --dtype and --device; on the GPU if there is one. `masked`: see
    `load`."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = chosen_dtype(args.dtype, device)
    base, adapter = find(args.model, args.adapter)
    model, tokenizer = load(base, adapter, dtype=dtype, device=device, code=args.code, masked=masked)
    return Named(model, tokenizer, device, base, adapter)


def mask_token(base: Path, adapter: Path | None) -> str | None:
    """What stands for a hidden token of a model that recipes/diffusion.py trained; None: it predicts the next token,
    as whatever is trained with an adapter does."""
    return own.noted(base, MASK) if adapter is None else None


def check_predicts(base: Path, adapter: Path | None = None) -> None:
    """UserError where a model does not predict the next token."""
    if mask_token(base, adapter):
        what = f"{base} was trained by recipes/diffusion.py: it restores hidden tokens and predicts no next one"
        raise UserError(what, fix=f"tune generate {base} --prompt … samples from it")


def note_other_base(adapter: Path, form: str, remedy: str = "") -> None:
    """Say that an adapter which was trained on a base kept in `form` lies on the plain one."""
    what = f"{adapter} was trained on a base kept in {form}, and lies on the plain one here"
    print(f"note: {what}: another model than was evaluated{remedy}", file=sys.stderr)


def _round(model: LanguageModel, adapter: Path) -> None:
    """Give a plain base the values that an adapter saw in training; a note on stderr says so, or that none can."""
    form = peft_format.base_form(adapter)
    if form in FORMATS:
        quant.round_through(model, form)
        inputs = "; what model.fp8 rounds besides, the inputs of its products, is as it is here" * (form == "fp8")
        print(f"note: below {adapter} the base has what {form} keeps of it, as in training{inputs}", file=sys.stderr)
    elif form:
        note_other_base(adapter, form)


def _rounds_inputs(form: dict | None) -> bool:
    """Whether a compressed-tensors config names a format for inputs of layers."""
    groups = (form or {}).get("config_groups") or {}
    return any(isinstance(group, dict) and group.get("input_activations") for group in groups.values())


def load(
    base: Path,
    adapter: Path | None,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    code: str | None = None,
    masked: bool = False,
    rounded: bool = True,
) -> tuple[LanguageModel, Tokenizer]:
    """The model with its adapter switched on, and the tokenizer it was trained with. `code`: as `model.code`; a note
    says where what is loaded was trained with another one. `masked`: it may be one with a `mask_token`. `rounded`: an
    adapter that was trained on a quantized base lies on that base, as it was evaluated."""
    now, was = own.mark(code), {folder: own.recorded(folder) for folder in (adapter, base) if folder is not None}
    for folder, one in was.items():
        own.compare(folder, one, now)
    name = (hub.read_config(base).get("architectures") or [""])[0]
    if name.endswith((heads.SEQUENCE.task, heads.STEPS.task)):
        reader = "recipes/grpo.py takes this one as a reward: rewards=[{model: …}]"
        if name.endswith(heads.STEPS.task):
            reader = "transformers loads this one by AutoModelForTokenClassification"
        fix = f"name a language model; {reader}"
        raise UserError(f"{base} is a {name}: it scores texts and writes none", fix=fix)
    if not masked:
        check_predicts(base, adapter)
    model = models.from_pretrained(base, dtype=dtype, device=device, decoder=own.find(code))
    model.code = now or next(filter(None, was.values()), None)
    if _rounds_inputs(hub.packed(model.config)):
        what = f"{base} rounds the inputs of its layers too, where it runs in 8 bits; here only its weights are rounded"
        print(f"note: {what}", file=sys.stderr)
    if adapter is not None:
        if rounded:
            _round(model, adapter)
        peft_format.load(model, adapter)
    trained_with = adapter if adapter is not None and any(adapter.glob("tokenizer*")) else base
    return model, tokenizers.from_pretrained(trained_with)
