"""A model's name -> a local folder: shipped with the package, on disk, or on the Hugging Face Hub."""

import json
import re
from pathlib import Path

from ftlib.errors import UserError
from ftlib.models import remote

SHIPPED = Path(__file__).parents[1] / "assets"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve(path: str | Path) -> Path:
    """The local file or folder `path` names: `ftlib:…` (shipped), a path on disk, or a Hub id `org/name[@revision]`.

    A Hub id is downloaded once into Hugging Face's cache (weights, config and tokenizer files, no code).
    """
    text = str(path)
    if text.startswith("ftlib:"):
        shipped = (SHIPPED / text.removeprefix("ftlib:")).resolve()
        if not shipped.is_relative_to(SHIPPED) or not shipped.exists():
            raise UserError(f"{text}: the package ships no such file", fix=f"shipped: {', '.join(_shipped())}")
        return shipped
    local = Path(text).expanduser()
    if local.exists():
        return local
    if HUB_ID.fullmatch(text) and not text.startswith((".", "/")):
        return remote.cached(text)
    parent = next(p for p in [*local.absolute().parents] if p.exists())
    raise UserError(
        f"{text}: no such file or folder (looked in {Path.cwd()})",
        fix=f"the nearest folder that exists is {parent}; a Hub id has the form org/name",
    )


def origin(path: str | Path) -> tuple[str, str | None]:
    """What other programs call the model at `path`: (Hub id, revision or None), or (absolute folder, None)."""
    text = str(path)
    if HUB_ID.fullmatch(text) and not Path(text).expanduser().exists():
        repo, _, revision = text.partition("@")
        return repo, revision or None
    return str(resolve(path).absolute()), None


def packed(config: dict) -> dict | None:
    """The `quantization_config` of a config.json, of its language part too: weights are codes in fewer bits."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def check_plain(folder: Path) -> None:
    """UserError for a model whose tensors are codes, where they are to be taken as numbers."""
    file = folder / "config.json"
    if file.is_file() and (form := packed(read_config(folder))):
        what = f"{folder} is kept in {form.get('quant_method', 'few bits')}, whose tensors are codes"
        raise UserError(what, where=str(file), fix="take the model as it was before it was rounded")


def read_config(folder: Path) -> dict:
    """config.json of a model folder."""
    file = folder / "config.json"
    if not file.exists():
        if (folder / "adapter_config.json").is_file():
            fix = "name the model it belongs to; lora.start_from continues an adapter, and `tune merge` makes one model"
            raise UserError(f"{folder} is an adapter, not a model", fix=fix)
        fix = of_run(folder) or "give a model folder in Hugging Face layout"
        raise UserError(f"{folder} has no config.json", fix=fix)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        # As the tokenizer's reader says it of the same file: one check of both then tells it once.
        raise UserError(f"not valid JSON: {error}", where=str(file), fix="download the file again") from None


def of_run(folder: Path, result: tuple[str, ...] = ("config.json", "adapter_config.json")) -> str | None:
    """What to name in place of a run's folder, or of one in it; None for others. `result`: one of these files is in
    what is wanted of the run."""
    for run in (folder, folder.parent, folder.parent.parent):
        final, steps = run / "final", sorted((run / "checkpoints").glob("step_*"))
        if final != folder and any((final / name).is_file() for name in result):
            return f"name the result of this run, {final}"
        if steps and not final.is_dir():
            newest = folder if folder in steps else steps[-1]
            return f"this run has no result yet; `tune merge MODEL {newest} OUT` makes one of a checkpoint"
    return None


def _shipped() -> list[str]:
    return sorted(f"ftlib:{p.relative_to(SHIPPED)}" for p in SHIPPED.glob("*/*") if p.name != "__pycache__")
