"""Scalable softmax (SSMax, Nakanishi 2025, arXiv 2501.19399): attention that stays sharp however many keys there are.

z_i -> n^(s z_i) / sum_j n^(s z_j), n the keys that a query sees and s learned for each head: scores times s log n. The
factor goes into the query, so every attention backend serves it. In config.json it is the end of `model_type`: a
program that does not know it refuses the model, and does not compute something else without a word.
"""

from dataclasses import replace

from ftlib.errors import UserError
from ftlib.layers.rope import LogKeys
from ftlib.models.arch import Arch

SUFFIX = "_ssmax"
START = "ssmax_start"  # key of config.json: s before training


def configured(config: dict, start: float) -> dict:
    """`config` with scalable softmax, s beginning at `start`."""
    return config | {"model_type": config["model_type"].removesuffix(SUFFIX) + SUFFIX, START: start}


def applied(arch: Arch, start: float, where: str) -> Arch:
    """`arch` with scalable softmax in every layer; UserError where the factor is not one of the query's."""
    if not isinstance(start, float | int):
        raise UserError(f"{START} is missing or no number: {start!r}", where=where)
    layers = []
    for layer in arch.layers:
        mixer, rope = layer.mixer, layer.mixer.rope
        others = {
            "layers without rope": rope is None,
            "queries that grow with their position already": rope is not None and rope.query_scale is not None,
            "attention sinks": mixer.sinks,
            "softly capped scores": mixer.softcap is not None,
        }
        if any(others.values()):
            what = f"scalable softmax is not for models with {next(name for name, has in others.items() if has)}"
            raise UserError(what, where=f"context.ssmax, {where}", fix="leave it out")
        layers.append(replace(layer, mixer=replace(mixer, rope=replace(rope, query_scale=LogKeys()), ssmax=start)))
    return replace(arch, layers=tuple(layers))
