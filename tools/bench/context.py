"""Peak memory over the length of one document: a step of recipes/lora_sft.py at each length, doubled until it fails.

    python tools/bench/context.py --out tools/bench/results/context_h100.json          # and a plot, context_h100.svg
    python tools/bench/context.py --tiled-mlp 8192 --out tools/bench/results/context_h100.json  # one more curve
    python tools/bench/context.py --quantize nf4 --out tools/bench/results/context_h100.json
    python tools/bench/context.py --from 262144 --limit 560 --out …                    # goes on where time ran out
    python tools/bench/context.py --tiny                                               # runs on a CPU

Random weights of the real shape. A length that is not begun because it would not end within --limit is said to be so:
only `out of memory` is a limit of the machine. On a CPU the peak is the process's.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import common
import plot
import torch

from ftlib import build, optim
from ftlib.layers.batch import Batch, Layout
from ftlib.losses.language_modelling import next_token_loss
from ftlib.parallel import run as processes
from ftlib.quant import QuantizedLinear
from ftlib.sections import Lora, Memory, Model, Optim, Parallel

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip
ONCE = 15.0  # seconds; a first step that took longer, compiling included, is not repeated


def main() -> None:
    started, args = time.perf_counter(), arguments()
    shape = common.config_of(args.shape) | (TINY if args.tiny else {})
    parts = [args.shape, "LoRA", args.quantize, f"{args.recompute} recompute", "offloaded" if args.offload else None]
    parts.append(f"tiles of {args.tiled_mlp}" if args.tiled_mlp else None)
    name = "tiny" if args.tiny else " ".join(part for part in parts if part)
    step = stepper(shape, args)
    rows, length, last = [], args.first, 0.0
    while length <= args.last:
        if time.perf_counter() - started + 4 * last > args.limit:  # attention is the square of the length
            rows.append({"tokens": length, "failed": f"not begun: it would not end within {args.limit:g} s"})
            break
        rows.append({"tokens": length, **figures(step, length)})
        print(json.dumps(rows[-1]), flush=True)
        if "failed" in rows[-1]:
            break
        last, length = rows[-1]["seconds"], 2 * length
    if args.out:
        save(Path(args.out), name, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--quantize", choices=("nf4", "int8", "fp8"))
    parser.add_argument("--recompute", default="full", choices=("none", "selective", "except_attention", "full"))
    parser.add_argument("--tiled-mlp", type=int, default=0, help="tokens at a time in feed-forward layers")
    parser.add_argument("--no-offload", dest="offload", action="store_false")
    parser.add_argument("--from", dest="first", type=int, default=4096)
    parser.add_argument("--to", dest="last", type=int, default=1 << 20)
    parser.add_argument("--limit", type=float, default=180, help="seconds in which all must end")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.tiny:
        args.first, args.last, args.offload = 64, 256, False
    return args


def stepper(shape: dict, args: argparse.Namespace):  # noqa: ANN201
    """`step(tokens) -> loss`: one optimizer step on one random document."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
    cfg = SimpleNamespace(
        model=Model(path=str(folder), quantize=args.quantize),
        lora=Lora(rank=16, alpha=32),
        memory=Memory(recompute=args.recompute, offload=args.offload, tiled_mlp=args.tiled_mlp),
        parallel=Parallel(),
        optim=Optim(lr=1e-4),
        from_scratch=True,
        dtype="bf16",
        seed=0,
    )
    run = processes.start(cfg.parallel, cfg.seed)
    model = build.model(cfg, run)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            drawn = torch.randn(module.base.shape, device=run.device, dtype=torch.bfloat16)
            module.base.fill(drawn.mul_(0.02))
    optimizer = optim.build(model, cfg.optim)

    def step(tokens: int) -> float:
        ids = torch.randint(shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0)).to(run.device)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=run.device)
        positions = torch.arange(tokens, device=run.device)[None]
        batch = Batch(ids, common.shifted(ids), positions, Layout.packed(ends, tokens, (1, tokens)), tokens - 1)
        loss = next_token_loss(model(batch), model.lm_head.weight, batch.labels, tokens - 1, **model.logit_terms)
        (loss / (tokens - 1)).backward()
        optim.step(optimizer, 1.0)
        return loss.item() / (tokens - 1)

    return step


def figures(step, tokens: int) -> dict:  # noqa: ANN001
    """Loss, peak and seconds of a step; `failed` with the reason where it does not fit."""
    torch.compiler.reset()  # each length has its own code, as in a run that has one length
    gpu = torch.cuda.is_available()
    try:
        for _ in range(2):
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            loss = step(tokens)
            seconds = time.perf_counter() - began
            if seconds > ONCE:
                break
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0][:200]}"}
    except RuntimeError as error:  # pinned host memory
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gib": round(peak / 2**30, 2), "seconds": round(seconds, 2), "loss": loss}


def save(out: Path, name: str, rows: list[dict]) -> None:
    """Put the curve into the file, lengths that it already has replaced, and draw all of its curves."""
    found = json.loads(out.read_text()) if out.is_file() else {"commands": [], "curves": {}}
    found["commands"].append("python tools/bench/context.py " + " ".join(sys.argv[1:]))
    found["versions"] = {"torch": torch.__version__}
    memory = None
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found |= {"device": torch.cuda.get_device_name(), "device_gib": round(memory, 1)}
    merged = {row["tokens"]: row for row in found["curves"].get(name, [])} | {row["tokens"]: row for row in rows}
    found["curves"][name] = [merged[tokens] for tokens in sorted(merged)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    curves = {
        key: [(row["tokens"], row["peak_gib"]) for row in curve if "peak_gib" in row]
        for key, curve in found["curves"].items()
    }
    curves = {key: points for key, points in curves.items() if points}
    if curves:
        drawn = plot.doubling("Peak memory of one step over its length", "tokens", "GiB", curves, memory)
        out.with_suffix(".svg").write_text(drawn)


if __name__ == "__main__":
    main()
