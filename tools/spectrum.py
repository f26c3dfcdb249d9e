"""Which matrices of a model to train: those whose singular values stand out from noise the most.

    python tools/spectrum.py MODEL --share 0.25                 # prints `train: {only: […]}` for a config of full_sft
    python tools/spectrum.py MODEL --share 0.25 --kinds q_proj,down_proj --table

Spectrum (Hartford et al. 2024, arXiv 2406.06623), with its authors' estimate: of each kind of matrix the share of
layers with the highest signal-to-noise ratio is trained, the rest frozen. MODEL: a Hugging Face folder, or a Hub id.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlib.errors import UserError  # noqa: E402
from ftlib.models import hub  # noqa: E402
from ftlib.models.weights import Weights, open_folder  # noqa: E402

NAME = re.compile(r".*layers\.(\d+)\.(.+)\.weight")
QUARTILES = 1.349  # how far a normal variable's quartiles are apart, in standard deviations


def signal_to_noise(values: Tensor, rows: int, columns: int) -> float:
    """Of a matrix's singular values: the sum of those above the Marchenko-Pastur bound of noise, over that of the
    others, over the largest. The noise's spread is taken from the quartiles, which a few large values do not move."""
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype)).tolist()
    bound = (high - low) / QUARTILES * (1 + (min(rows, columns) / max(rows, columns)) ** 0.5)
    signal, noise = values[values > bound].sum().item(), values[values <= bound].sum().item()
    return (signal / noise if noise else float("inf")) / values.max().item()


def ratios(weights: Weights, kinds: Sequence[str] = ()) -> dict[str, dict[int, float]]:
    """Kind of matrix -> layer -> ratio, of every matrix of the blocks, or of those kinds whose name ends so."""
    found: dict[str, dict[int, float]] = {}
    for key, shape in weights.shapes.items():
        match = NAME.fullmatch(key)
        if not match or len(shape) != 2 or (kinds and not match[2].endswith(tuple(kinds))):
            continue
        values = torch.linalg.svdvals(weights.read(key).float())
        found.setdefault(match[2], {})[int(match[1])] = signal_to_noise(values, *shape)
    if not found:
        raise UserError("no matrix of the model's blocks is of such a kind", fix="name the ends of names: q_proj, …")
    return found


def patterns(found: dict[str, dict[int, float]], share: float) -> list[str]:
    """One regular expression a kind, for `train.only`: its best layers, at least one."""
    chosen = []
    for kind, layers in sorted(found.items()):
        best = sorted(layers, key=lambda layer: (-layers[layer], layer))[: max(1, round(share * len(layers)))]
        chosen.append(rf"layers\.({'|'.join(map(str, sorted(best)))})\.{re.escape(kind)}\.")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.25, help="of the layers, for each kind of matrix")
    parser.add_argument("--kinds", default="", help="ends of names, comma separated; default: all")
    parser.add_argument("--table", action="store_true", help="also print every ratio")
    args = parser.parse_args(argv)
    if not 0 < args.share <= 1:
        parser.error("--share: above 0, at most 1")
    try:
        folder = hub.resolve(args.model)
        hub.check_plain(folder)
        found = ratios(open_folder(folder), [kind for kind in args.kinds.split(",") if kind])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.table:
        for kind, layers in sorted(found.items()):
            print(f"# {kind}: " + ", ".join(f"{layer} {ratio:.4g}" for layer, ratio in sorted(layers.items())))
    print("train:\n  only:")
    for pattern in patterns(found, args.share):
        print(f"    - '{pattern}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
