"""Training every weight on one GPU: our step, the peers', ours again; then the recipe on streamed text.

    python tools/bench/pretrain.py --shape qwen3-0.6b --rows 8 --seq-len 4096 --recompute none
    python tools/bench/pretrain.py --shape qwen3-1.7b --rows 4 --seq-len 4096 --recompute selective --out NAME.json
    python tools/bench/pretrain.py … --peer-path torchtitan=/folder/with/its/packages

Peers: `plain` is compiled PyTorch as one would write it; torchtitan runs where a folder with its packages is named.
The contenders have identical weights and tokens, each in its own process; a figure counts only if losses and gradient
norms of the first steps agree. MFU: 6 FLOP a weight and token, the head's included and the looked-up embedding's not,
plus causal attention, over 744 TFLOP/s. The last row is `recipes/pretrain.py` itself with tokenisation in workers: its
tokens a second, and `data_wait`, the share of a step in which it waited for text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import sft

WARM = 10  # steps of the recipe before its median is taken


def main() -> None:
    args = arguments()
    work = {"method": "full", "rank": 0, "offload": False}
    work |= {name: getattr(args, name) for name in ("shape", "rows", "seq_len", "recompute", "attention", "cuda_graph")}
    rows: list[dict] = []
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    peers = ["plain", *paths] if args.vs is None else [peer for peer in args.vs.split(",") if peer]
    for script in ("ours", *(f"{peer}_peer" for peer in peers), "ours"):
        sft.add(rows, sft.run(script, work, paths, args.limit), args.out)
    if args.steps:
        row = recipe(work, args.steps, args.workers, args.limit)
        print(json.dumps(row))
        sft.write([*rows, row], args.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", help="qwen3-0.6b or qwen3-1.7b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--recompute", choices=("none", "selective", "except_attention", "full"), default="none")
    parser.add_argument("--attention", default="auto", help="ours' `model.attention`; peers have their own")
    parser.add_argument("--cuda-graph", action="store_true", help="ours launches its blocks at once")
    parser.add_argument("--vs", help="peers, comma separated; without it plain and those of --peer-path")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--steps", type=int, default=40, help="of the recipe; 0: leave it out")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenise for the recipe")
    parser.add_argument("--limit", type=int, default=250, help="seconds a contender may take")
    parser.add_argument("--out")
    return parser.parse_args()


def recipe(work: dict, steps: int, workers: int, limit: int) -> dict:
    """A row of medians over the recipe's steps after the first ones; {"contender", "failed"} if it gives none."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(common.config_of(work["shape"])))
    settings = {
        "model": {"path": str(folder), "attention": work.get("attention", "auto")},
        "tokenizer": {"path": "ftlib:demo/model"},
        "data": {"sources": [{"path": "ftlib:demo/data/pretrain_stories.jsonl.gz"}], "seq_len": work["seq_len"]},
        "stream": {"workers": workers, "max_documents": 256},
        "batch": {"rows": work["rows"], "micro_rows": work["rows"]},
        "steps": steps,
        "memory": {"recompute": work["recompute"], "cuda_graph": work["cuda_graph"]},
        "checkpoint": {"every": 0},
        "log": {"every": 10},
        "output_dir": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "ftlib", "run", "recipes/pretrain.py", "--config", str(folder / "run.yaml")]
    try:
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"contender": "recipe", "failed": f"no result within {limit} s"}
    file = folder / "out" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    timed = [row for row in rows if "loss" in row][WARM:]
    if done.returncode or not timed:
        return {"contender": "recipe", "failed": (done.stderr or done.stdout)[-1500:]}
    speed = statistics.median(row["tokens_per_s"] for row in timed)
    waits = sorted(row["data_wait"] for row in timed)
    row = {
        "contender": "recipe",
        "work": work,
        "tokens_per_s": round(speed),
        "data_wait": {"median": statistics.median(waits), "largest": waits[-1]},
        "peak_gib": timed[-1]["peak_memory_gib"],
        "loss": [rows[0].get("loss"), timed[-1]["loss"]],
    }
    return row | sft.mfu(row)


if __name__ == "__main__":
    main()
