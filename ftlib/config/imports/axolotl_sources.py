"""Axolotl's `datasets`: each entry as sources of ours, and what entries say that holds for all rows here."""

from typing import Any

from ftlib.config.imports.rules import Imported, apply, choice, listed, roles, to

_TYPES = {  # by the whole name, else by what is in front of its dot
    "alpaca_w_system.load_open_orca": "qa",
    "alpaca_chat.load_qa": "qa",
    "alpaca_chat.load_camel_ai": "qa",
    "alpaca_w_system": "alpaca",
    "alpaca_chat": "alpaca",
    "alpaca_instruct": "alpaca",
    "alpaca": "alpaca",
    "gpteacher": "alpaca",
    "chat_template": "messages",
    "sharegpt": "messages",
    "messages": "messages",
    "completion": "text",
    "pretrain": "text",
    "text": "text",
    "input_output": "segments",
    "oasst": "oasst",
    "stepwise_supervised": "stepwise",
}
_FIELDS = {
    "field_messages": "messages",
    "field": "text",
    "text_column": "text",
    "message_field_role": "role",
    "message_field_content": "content",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
TRAIN_ON_END = choice(turn="all", all="all", last="last", none="none")
_OF_ALL = {  # keys of an entry that are keys of all data here
    "roles_to_train": to("data.train_on", roles),
    "train_on_eos": to("data.train_on_end", TRAIN_ON_END),
    "split_thinking": to("data.thinking", lambda on: "split" if on else None),
    "step_separator": to("reward.separator"),
    "train_on_last_step_only": to("reward.last_step"),
}
_PROMPTS = "rows are rendered by the chat template: data.template takes a .jinja file"
_WHY = {
    "system_prompt": "write it in the rows",
    "system_format": _PROMPTS,
    "format": _PROMPTS,
    "no_input_format": _PROMPTS,
    "prompt_format": _PROMPTS,
    "chosen_format": _PROMPTS,
    "rejected_format": _PROMPTS,
    "completion_format": _PROMPTS,
    "shards": "data.sources[].split takes a part: '[:25%]'",
    "message_field_training": "a message's `train` says whether it is trained",
    "message_field_training_detail": "a message's `train_detail` says which of its characters are trained",
}
_PLAIN = ("path", "ds_type", "type", "split", "data_files", "roles", "message_property_mappings", "chat_template",
          "name", "revision", "weight", *_OF_ALL)  # fmt: skip


def sources(theirs: dict[str, Any], made: Imported) -> None:
    """data.sources, data.eval, and the keys of entries that hold for all of them."""
    datasets = theirs.get("pretraining_dataset") or theirs.get("datasets") or []
    datasets = [{"path": datasets, "type": "completion"}] if isinstance(datasets, str) else listed(datasets)
    for key, ours, entries in (
        ("datasets", "data.sources", datasets),
        ("test_datasets", "data.eval", theirs.get("test_datasets") or []),
    ):
        found = [source for i, entry in enumerate(entries) for source in _sources(entry, f"{key}[{i}]", made)]
        if found:
            made.set(ours, found)
    for key, rule in _OF_ALL.items():
        asked = [entry.get(key) for entry in datasets]
        if asked and all(value == asked[0] for value in asked):
            apply({key: rule}, {key: asked[0]}, made, "datasets[].")
        elif any(asked):
            made.lost.append((f"datasets[].{key}", f"{rule.to} holds for all rows, and these entries differ"))


def _sources(entry: dict[str, Any], key: str, made: Imported) -> list[dict[str, Any]]:
    """A source for each file that the entry names."""
    kind = entry.get("type")
    entry = {**entry, **kind} if isinstance(kind, dict) else entry
    path = f"{entry.get('path')}@{entry['revision']}" if entry.get("revision") else entry.get("path")
    source = _format(kind, key, made) | _columns(entry, paired=made.recipe in ("dpo", "reward"))
    if entry.get("roles"):
        named = {name: ours for ours, names in entry["roles"].items() for name in listed(names) if name != ours}
        source |= {"roles": named} if named else {}
    if entry.get("split") and entry["split"] != "train":
        source["split"] = entry["split"]
    if entry.get("name"):
        source["subset"] = entry["name"]
    if entry.get("weight") is not None:
        source["weight"] = float(entry["weight"])
    made.lost += [
        (f"{key}.{name}", _WHY.get(name, "not a key that is known here"))
        for name in entry
        if name not in _FIELDS and name not in _PLAIN and entry[name] is not None
    ]
    return [{"path": place, **source} for place in listed(entry.get("data_files") or [path])]


def _format(kind: Any, key: str, made: Imported) -> dict[str, Any]:
    """The format of rows; pairs, rated answers and prompts are told from their columns."""
    if kind is None or isinstance(kind, dict):
        return {}
    name = str(kind)
    if made.recipe == "grpo":
        if "." in name:
            made.lost.append((f"{key}.type", f"{name}: a function of a row is data.sources[].format: ./file.py:name"))
        return {}
    known = _TYPES.get(name) or _TYPES.get(name.split(".")[0])
    if made.recipe in ("dpo", "reward") and known != "stepwise":
        return {}
    if known is None:
        made.lost.append((f"{key}.type", f"{kind!r} has no equivalent; the format is told from the columns"))
    return {"format": known} if known else {}


def _columns(entry: dict[str, Any], paired: bool) -> dict[str, Any]:
    """Columns that have other names here; in front of a pair, the messages are its prompt."""
    found = {ours: entry[name] for name, ours in _FIELDS.items() if isinstance(entry.get(name), str)}
    found |= {k: v for k, v in (entry.get("message_property_mappings") or {}).items() if k in ("role", "content")}
    if paired:
        messages = found.pop("messages", None)
        found = {ours: name for ours, name in found.items() if ours not in ("role", "content")}  # told from the turns
        if messages and messages != found.get("chosen"):
            found["prompt"] = messages
    found = {ours: name for ours, name in found.items() if ours != name}
    return {"columns": found} if found else {}
