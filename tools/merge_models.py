"""Merge models of one shape, tensor by tensor, on the CPU; memory: one tensor of each.

    python tools/merge_models.py OUT A B --method linear --weights 0.7 0.3
    python tools/merge_models.py OUT A B --method slerp --weights 0.6 0.4          # 0.4 of the way from A to B
    python tools/merge_models.py OUT A B C --base BASE --method ties --density 0.2
    python tools/merge_models.py OUT A B --base BASE --method dare --density 0.1 --seed 0

Models are folders in Hugging Face layout. config.json, tokenizer and dtype of the result are those of the base or A.
"""

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.cli.arguments import Parser  # noqa: E402
from ftlib.errors import UserError  # noqa: E402
from ftlib.models import hub  # noqa: E402
from ftlib.models.weights import Weights, open_folder, save_tensors  # noqa: E402

SHARD_BYTES = 5 * 1024**3
NEARLY_PARALLEL = 0.9995  # cosine from which a straight line is as good, and the sine too small to divide by


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w x / sum w (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""
    return sum(w * x for w, x in zip(weights, tensors, strict=True)) / sum(weights)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The way from one tensor to another, a share t of it, along the arc between them (Shoemake 1985)."""
    cosine = torch.dot(first.flatten(), second.flatten()) / (first.norm() * second.norm()).clamp(min=1e-12)
    if cosine.abs() > NEARLY_PARALLEL:
        return (1 - t) * first + t * second
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def ties(base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect signs, merge those that agree (Yadav et al. 2023, arXiv 2306.01708).

    Of each difference to the base the largest `density` stays; the sign of their weighted sum is elected; the result is
    the base plus the weighted mean of the differences with that sign.
    """
    kept = torch.stack([trim(x - base, density) for x in tensors])
    shares = torch.tensor(weights, dtype=kept.dtype).view(-1, *[1] * base.ndim)
    agrees = (kept.sign() == (shares * kept).sum(0).sign()) & (kept != 0)
    total = (shares * agrees).sum(0)
    return base + (shares * kept * agrees).sum(0) / torch.where(total > 0, total, 1)


def trim(x: Tensor, density: float) -> Tensor:
    """The share `density` of entries that are largest in magnitude; the others 0."""
    count = max(1, round(density * x.numel()))
    if count >= x.numel():
        return x
    out = torch.zeros_like(x).flatten()
    at = x.abs().flatten().topk(count).indices
    out[at] = x.flatten()[at]
    return out.view_as(x)


def dare(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    """Drop and rescale (Yu et al. 2023, arXiv 2311.03099): of each difference to the base a random share `density`
    stays, divided by it; base plus their weighted mean."""
    parts = []
    for x in tensors:
        keep = torch.rand(x.shape, generator=generator) < density
        parts.append((x - base) * keep / density)
    return base + linear(parts, weights)


def merge(out: Path, folders: Sequence[Path], args: argparse.Namespace) -> None:
    """Write the merged model. UserError where the models do not fit each other."""
    if out.exists():
        raise UserError(f"{out} exists", fix="name a new folder")
    base = args.base or folders[0]
    for folder in [base, *folders]:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder", fix="name a model's folder; tune download ID DIR makes one")
        hub.check_plain(Path(folder))
    opened = [open_folder(folder) for folder in [base, *folders]]
    wanted = opened[0].shapes
    for folder, weights in zip(folders, opened[1:], strict=True):
        differ = sorted(k for k in wanted.keys() | weights.shapes.keys() if wanted.get(k) != weights.shapes.get(k))
        if differ:
            what = f"{folder} and {base} differ in {len(differ)} tensors: {', '.join(differ[:3])}"
            raise UserError(what, fix="merge models of one shape")
    texts = {folder: _tokenizer(folder) for folder in [base, *folders]}
    if others := [folder for folder, text in texts.items() if text and texts[base] and text != texts[base]]:
        print(f"warning: {others[0]} has another tokenizer.json than {base}, whose the result gets", file=sys.stderr)
    out.mkdir(parents=True)
    _write(out, opened, args)
    for file in Path(base).iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt") or ".safetensors." in file.name
        if file.is_file() and not weights:
            shutil.copyfile(file, out / file.name)


def _tokenizer(folder: Path) -> bytes:
    file = Path(folder) / "tokenizer.json"
    return file.read_bytes() if file.is_file() else b""


def _write(out: Path, opened: Sequence[Weights], args: argparse.Namespace) -> None:
    shard, size, shards = {}, 0, []
    names = list(opened[0].shapes)
    for number, key in enumerate(names):
        found = _merged(key, [weights.read(key) for weights in opened], args)
        shard[key], size = found.contiguous(), size + found.numel() * found.element_size()
        if size >= SHARD_BYTES or number == len(names) - 1:
            shards.append(list(shard))
            save_tensors(shard, out / f"part-{len(shards)}.safetensors")
            shard, size = {}, 0
    if len(shards) == 1:
        (out / "part-1.safetensors").rename(out / "model.safetensors")
        return
    index = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (out / f"part-{number}.safetensors").rename(out / name)
        index |= dict.fromkeys(keys, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))


def _merged(key: str, tensors: list[Tensor], args: argparse.Namespace) -> Tensor:
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        return tensors[0]
    base, *others = (x.float() for x in tensors)
    if args.method == "linear":
        found = linear(others, args.weights)
    elif args.method == "slerp":
        found = slerp(*others, args.weights[1] / sum(args.weights))
    elif args.method == "ties":
        found = ties(base, others, args.weights, args.density)
    else:
        # Of the name: the order of tensors does not matter. 32 bits: a generator on the CPU reads no more of a seed.
        seed = zlib.crc32(f"{args.seed}:{key}".encode())
        found = dare(base, others, args.weights, args.density, torch.Generator().manual_seed(seed))
    return found.to(dtype)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; UserError where that makes no sense."""
    parser = Parser("merge", __doc__)
    parser.prog = Path(__file__).name
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--method", choices=("linear", "slerp", "ties", "dare"), default="linear")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each model; default: equal")
    parser.add_argument("--base", type=Path, help="ties, dare: what the models were trained from")
    parser.add_argument("--density", type=float, help="ties, dare: share of each difference that stays, 0.2")
    parser.add_argument("--seed", type=int, default=0, help="dare")
    args = parser.parse(sys.argv[1:] if argv is None else argv)
    args.weights = args.weights or [1.0] * len(args.models)
    if len(args.weights) != len(args.models) or sum(args.weights) <= 0:
        parser.error("--weights: one for each model, together above 0")
    if args.method == "slerp" and len(args.models) != 2:
        parser.error("--method slerp: two models")
    if (args.method in ("ties", "dare")) != (args.base is not None):
        parser.error("--base: for ties and dare, and only for them")
    if args.density is not None and args.method not in ("ties", "dare"):
        parser.error("--density: for ties and dare")
    args.density = 0.2 if args.density is None else args.density
    if not 0 < args.density <= 1:
        parser.error("--density: above 0, at most 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 a mistake."""
    try:
        args = arguments(argv)
        merge(args.out, args.models, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
