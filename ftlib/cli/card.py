"""A model card: what it is, what it was made of, how to load it. Nothing of the user's machine gets into it."""

import json
from pathlib import Path
from typing import Any

import yaml

import ftlib
from ftlib.errors import UserError
from ftlib.models.hub import HUB_ID


def text(folder: Path, name: str, base: str | None) -> str:
    """The folder's own README.md, else a card for the adapter or model in it, to be uploaded as `name`."""
    own = folder / "README.md"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    is_adapter = (folder / "adapter_config.json").is_file()
    run = _yaml(folder.parent / "config.yaml")
    head: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["ftlib", "lora"] if is_adapter else ["ftlib"]}
    head |= {"base_model": base} if base else {}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {name.split('/')[1]}"]
    kind = "A LoRA adapter" if is_adapter else "A model"
    parts.append(f"{kind} {'for' if is_adapter else 'made from'} {base or 'a base model'}, trained with ftlib "
                 f"{ftlib.__version__}.")  # fmt: skip
    parts += _results(folder.parent / "metrics.jsonl")
    parts += _training(run)
    parts.append("## Use\n\n```python\n" + _use(name, base, is_adapter) + "\n```")
    return "\n\n".join(parts) + "\n"


def base_of(folder: Path) -> str | None:
    """The Hub id of the model that an adapter or a run started from; None when that was a path of this machine."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        name = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    else:
        name = _yaml(folder.parent / "config.yaml").get("model", {}).get("path")
    if not name or Path(name).exists() or not HUB_ID.fullmatch(name):
        return None
    return name.partition("@")[0]


def adapter_config(folder: Path, base: str | None) -> bytes | None:
    """adapter_config.json with the base others can find; None for a model. UserError if nobody else could load it."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    if base is None:
        raise UserError(
            "the adapter's base model is a folder of this machine, so that nobody else could load it",
            where=str(file),
            fix="name the base on the Hub: --base org/name; or upload the merged model (`tune merge`)",
        )
    config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    return (json.dumps(config, indent=2) + "\n").encode()


def _results(file: Path) -> list[str]:
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scores = [row for row in rows if any(key.startswith("eval_") or key == "exact_match" for key in row)]
    if len(scores) < 2:
        return []
    first, last = scores[0], scores[-1]
    lines = [f"| {key} | {first[key]:.4f} | {last[key]:.4f} |" for key in first if key != "step" and key in last]
    return ["\n".join(["## Results", "", "| held out | before | after |", "|---|---|---|", *lines])]


def _training(run: dict[str, Any]) -> list[str]:
    """The settings of the run, without paths."""
    if not run:
        return []
    shown = {key: run[key] for key in ("lora", "batch", "steps", "epochs", "optim", "schedule", "seed", "dtype")
             if run.get(key) is not None}  # fmt: skip
    unset = (None, False, {}, [])
    shown = {k: {n: x for n, x in v.items() if x not in unset} if isinstance(v, dict) else v for k, v in shown.items()}
    data = run.get("data") or {}
    names = [source.get("name") or Path(str(source.get("path"))).name for source in data.get("sources") or []]
    shown["data"] = {"sources": names, "seq_len": data.get("seq_len")}
    return [f"## Training\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"]


def _use(name: str, base: str | None, is_adapter: bool) -> str:
    if is_adapter:
        return "\n".join([
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained("{base or "BASE"}")',
            f'model = PeftModel.from_pretrained(model, "{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ])  # fmt: skip
    return "\n".join([
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ])  # fmt: skip


def _yaml(file: Path) -> dict[str, Any]:
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
