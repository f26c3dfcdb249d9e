"""How long gradients in 8-bit floats are beside those in bf16: a full fine-tune's, batch by batch and part by part.

    python tools/bench/fp8_gradient.py --shape qwen3-1.7b --rows 2 --seq-len 4096           # on a GPU
    python tools/bench/fp8_gradient.py --shape qwen3-1.7b --rows 2 --seq-len 192            # on a CPU, half an hour
    python tools/bench/fp8_gradient.py --tiny

Nothing is trained: every mode has the same weights and tokens. `eager` does not compile blocks; `formula` multiplies
rounded operands in float32, as a CPU does. Ratios are of norms, to bf16's of the same batch.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import common
import ours
import torch

from ftlib.kernels import fp8_linear
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.models import LanguageModel

MODES = ("bf16", "tensorwise", "tensorwise eager", "tensorwise formula", "rowwise")


def main() -> None:
    args = arguments()
    work = {"shape": args.shape, "method": "full", "rows": args.rows, "seq_len": args.seq_len, "rank": 16}
    work["recompute"] = "none" if common.DEVICE.type == "cuda" else "full"
    rows = {mode: norms(work, mode, args.batches) for mode in args.modes.split(",")}
    plain = rows["bf16"]
    parts = sorted(plain[0], key=lambda part: (part != "all", part))
    print(f"{'':24}" + "".join(f"{part:>13}" for part in parts))
    for mode, found in rows.items():
        for number, norm in enumerate(found):
            ratios = "".join(f"{norm[part] / plain[number][part]:13.4f}" for part in parts)
            print(f"{f'{mode}, batch {number}':24}{ratios}   norm {norm['all']:.4f}", flush=True)
    if args.out:
        device = torch.cuda.get_device_name() if common.DEVICE.type == "cuda" else "cpu"
        about = {"work": work, "device": device, "torch": torch.__version__, "norms": rows}
        Path(args.out).write_text(json.dumps(about, indent=1) + "\n")


def norms(work: dict, mode: str, batches: int) -> list[dict[str, float]]:
    """For each batch, by kind of matrix and of `all`: the 2-norm of the gradient, in float64."""
    kind, _, how = mode.partition(" ")
    model = ours.build_model(work | {"fp8": None if kind == "bf16" else kind})[0]
    with computing(how):
        return [gradient(model, work, number) for number in range(batches)]


@contextmanager
def computing(how: str) -> Iterator[None]:
    """As it would, `eager`, or by the `formula`."""
    if not how:
        yield
        return
    native = fp8_linear._native if how == "eager" else lambda x: False
    with torch.compiler.set_stance("force_eager"), mock.patch.object(fp8_linear, "_native", native):
        yield


def gradient(model: LanguageModel, work: dict, number: int) -> dict[str, float]:
    """The norms of one batch."""
    rows, length = work["rows"], work["seq_len"]
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=common.DEVICE)
    positions = torch.arange(length, device=common.DEVICE).expand(rows, length)
    ids = common.tokens(work, number).to(common.DEVICE)
    layout = Layout.packed(cu_seqlens, length, (rows, length))
    batch = Batch(ids, common.shifted(ids), positions, layout, target_tokens=rows * (length - 1))
    model.zero_grad(set_to_none=True)
    head, terms = model.lm_head.weight, model.logit_terms
    (next_token_loss(model(batch), head, batch.labels, batch.target_tokens, **terms) / batch.target_tokens).backward()
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square().item()
        squares["all"] += square
        if parameter.ndim > 1:
            squares[name.split(".")[-2]] += square
    return {part: square**0.5 for part, square in squares.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--modes", default=",".join(MODES if common.DEVICE.type == "cuda" else (*MODES[:2], MODES[-1])))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.seq_len, args.batches = f"tiny-{args.shape}", 64, 2
    return args


if __name__ == "__main__":
    main()
