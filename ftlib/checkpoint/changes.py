"""Which keys of a config may change when a run goes on: the one list, and the words for what changed."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

HOLD, TELL, PASS = "hold", "tell", "pass"
Tree = dict[str, Any]  # a config as plain dicts, lists and scalars

# Another run if they change, so refused: what is learned, by which method, from which start. Section -> its keys.
HELD = {
    "": "from_scratch seed dtype",
    "model": "quantize fp8",
    "sizes": "layers dim heads kv_heads head_dim hidden vocab experts experts_per_token",
    "init": "std scaled",
    "context": "length ssmax skip",
    "tokenizer": "add_tokens rows_multiple_of",
    "data": "seq_len pack",
    "stream": "buffer max_documents",
    "batch": "rows",
    "train": "only freeze",
    "lora": "rank alpha targets rslora dora init rank_pattern alpha_pattern modules_to_save",
    "relora": "every",
    "lisa": "layers",
    "qat": "scheme group after",
    "loss": "name eaft_alpha eaft_k",
    "mtp": "depth",
    "optim": "name states rank_fraction",
    "dpo": "loss beta label_smoothing gamma tau average desirable undesirable sft length_alpha on_policy share_prompt"
    " reference",
    "reward": "kind centre margin share_prompt separator last_step",
    "distill": "teacher divergence beta temperature hard top_k",
    "diffusion": "mask_token least",
    "algorithm": "preset advantage loss ratio aggregation kl_in correction",
    "rewards": "fn model args",
    "rollout": "prompts group",
    "dialogue": "tools environment",
    "teacher": "path",
}
# May change, and is told. Rows, base and adapter are held by their contents: a file may move, not change.
TOLD = {
    "": "steps epochs neftune deterministic",
    "model": "path code fp8_smallest",
    "tokenizer": "path pad_token",
    "data": "eval template template_args system overlong train_on train_on_end thinking deduplicate on_bad_row",
    "data.sources": "path format weight split subset columns roles name",
    "stream": "mix",
    "lora": "dropout lr_ratio start_from",
    "relora": "warmup_steps keep",
    "lisa": "every",
    "loss": "z_loss router_aux",
    "mtp": "weight",
    "optim": "lr betas eps weight_decay groups mup_width momentum alpha beta3 slow_warmup rounding in_backward"
    " max_grad_norm nonfinite spike",
    "schedule": "name warmup_steps decay_steps min_ratio",
    "distill": "stored",
    "algorithm": "clip_low clip_high dual_clip ratio_cap kl_coef correction_cap overlong overlong_margin"
    " dynamic_sampling",
    "rewards": "weight",
    "rollout": "max_new_tokens temperature minibatches engine staleness max_rounds",
    "dialogue": "max_turns",
}
# May change without a word: how the machine is used, what is said, scored and written.
SILENT = {
    "": "profile output_dir",
    "model": "attention",
    "data": "cache workers",
    "stream": "workers cache_gib",
    "batch": "micro_rows",
    "optim": "offload",
    "diffusion": "prompts length steps block temperature",
    "rewards": "timeout_s workers",
    "rollout": "max_batch vllm_memory vllm_sleep mismatch_warn mismatch_abort show show_every",
    "dialogue": "timeout_s",
    "eval": "every exact_match max_new_tokens samples prompts metric patience",
    "memory": "recompute recompute_layers recompute_rest offload tiled_mlp budget_gib compile cuda_graph",
    "parallel": "dp_replicate dp_shard cp cp_style tp timeout_s",
    "checkpoint": "every keep keep_best resume background",
    "log": "every to project name statistics",
}


OF_A_NODE = frozenset(("output_dir", "profile", "data.cache", "data.workers", "data.sources.path"))
OF_A_NODE |= {"model.path", "tokenizer.path", "lora.start_from"}  # where files lie may differ from node to node


def _keys(sections: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{section}.{key}".lstrip(".") for section, keys in sections.items() for key in keys.split())


LISTED = {HOLD: _keys(HELD), TELL: _keys(TOLD), PASS: _keys(SILENT)}
# Entries of a fingerprint whose values say nothing to a reader: what to say, where to look, which sections decide it.
DIGESTS = {
    "data": ("other rows than then", "data, tokenizer", ("data", "tokenizer")),
    "model": ("other weights or another config.json than then", "model.path", ("model",)),
}
ROWS_FOLLOW = frozenset({"seed", "data.seq_len", "tokenizer.add_tokens", "batch.rows"})  # held out, cut, in a step


def config_of(folder: Path) -> Tree:
    """The config that the last run in `folder` left there, empty where that cannot be told."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def refused(saved: Tree, mine: Tree, was: Tree, now: Tree) -> list[str]:
    """Why a run does not go on, a line each: what differs between two fingerprints, and between the two configs as far
    as they are known. What only follows from a key that is named is left out."""
    saved, mine, changed = _flat(saved), _flat(mine), _changed(was, now)
    drift = [key for key in sorted(saved.keys() | mine.keys()) if saved.get(key) != mine.get(key)]
    drift = [key for key in drift if key in DIGESTS or not _follows(key, changed)]
    lacking = [key for key in drift if (key in saved) != (key in mine) and key not in changed]  # off, or not yet known
    drift = [key for key in drift if key not in lacking or not (_has(was, key) and _has(now, key))]
    named = [key for key, (old, new) in changed.items() if kind(key) == HOLD and _unmoved(old) != _unmoved(new)]
    for key in drift:
        if key == "data" or (key == "model" and not named):  # a model with other sizes has another path, too
            named += [name for name in changed if name.split(".")[0] in DIGESTS[key][2]]
    if not ROWS_FOLLOW.isdisjoint([*drift, *named]):
        drift = [key for key in drift if key != "data"]
    differ = {key: (saved.get(key), mine.get(key)) for key in drift} | changed
    return [
        _digest(key, named) if key in DIGESTS else f"{key}: {_shown(differ[key][0])} then, {_shown(differ[key][1])} now"
        for key in dict.fromkeys([*drift, *named])
    ]


def noted(was: Tree, now: Tree) -> list[str]:
    """Changes that a run goes on with and a reader should know, as `key: was -> now`."""
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in _changed(was, now).items()]


def apart(configs: Sequence[Tree]) -> list[str]:
    """Where the processes of one run were given different configs, a line a key; paths may differ from node to node."""
    first, found = configs[0], []
    for rank, other in enumerate(configs):
        for key, mine, theirs in _differences(first, other):
            if _plain(key) not in OF_A_NODE:
                found.append(f"{key}: {_shown(mine)} in process 0, {_shown(theirs)} in process {rank}")
    return found


def kind(key: str) -> str:
    """What becomes of a change of `key`, or of a section that came or went; keys that nobody listed are told."""
    plain = _plain(key)
    found = [what for what, keys in LISTED.items() if plain in keys or any(k.startswith(f"{plain}.") for k in keys)]
    return found[0] if found else TELL


def _digest(key: str, named: list[str]) -> str:
    what, where, _ = DIGESTS[key]
    return f"{key}: {what}" if named else f"{key}: {what} ({where})"


def _follows(key: str, changed: Tree) -> bool:
    """Whether a config has the difference in a part of what the fingerprint has whole, or the other way round."""
    return any(other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in changed)


def _changed(was: Tree, now: Tree) -> dict[str, tuple[Any, Any]]:
    """Key -> its value in both configs where they differ, but for what may change without a word."""
    return {key: (old, new) for key, old, new in _differences(was, now) if kind(key) != PASS}


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ. One that a config lacks is of another version or recipe, and left out."""
    within = not any(_plain(key) in keys for keys in LISTED.values())
    if within and isinstance(was, dict) and isinstance(now, dict):
        for name in now:
            if name in was:
                yield from _differences(was[name], now[name], f"{key}.{name}" if key else name)
    elif within and _is_sections(was) and _is_sections(now) and len(was) == len(now):
        for index, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from _differences(old, new, f"{key}[{index}]")
    elif was != now:
        yield key, was, now


def _unmoved(value: Any) -> str:
    """A value with files named without their folders: one that has moved is no other reward."""
    return re.sub(r"(?<=')/[^']*/", "", repr(value))


def _is_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _plain(key: str) -> str:
    """`data.sources[0].path` as it is listed: `data.sources.path`."""
    return re.sub(r"\[\d+\]", "", key)


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _flat(fingerprint: Tree) -> Tree:
    """With the keys of whole sections as entries of their own."""
    sections = {key: value for key, value in fingerprint.items() if isinstance(value, dict)}
    inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {key: value for key, value in fingerprint.items() if key not in sections} | inner


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")
