"""Side by side on one GPU: our step, a peer's, ours again, each in its own process on identical weights and tokens.

    python tools/bench/sft.py --shape llama-3.1-8b --rows 2 --seq-len 4096 --recompute none --vs torchtune
    python tools/bench/sft.py … --peer-path torchtune=/folder/with/its/packages --out results/NAME.json

A figure counts only if losses and gradient norms of the first steps agree; the table says so, and the rows go to --out.
With --quantize or --qat, the peer `dequantized` is our own step on the plain weights that the rounded ones stand for;
with --fp8, the peer `bf16` is our own step without, with --states or --rounding the peer `usual`. Where products are
rounded otherwise, they may be 0.5 % of the loss and 10 % of the gradient norm apart.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OWN = ("dequantized", "bf16", "usual")  # peers that are our own step: behind them it does not run again
MEASURED, DATASHEET = 744e12, 989e12  # dense bf16 FLOP/s of an H100: a large matmul here, and the vendor's number


def main() -> None:
    args = arguments()
    keys = ("shape", "method", "rows", "seq_len", "recompute", "rank", "offload", "quantize", "fp8", "tiled_mlp")
    keys += ("qat", "budget_gib", "attention", "optimizer", "states", "rounding", "in_backward", "cuda_graph")
    work = {key: getattr(args, key) for key in keys}
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    named = [peer for peer in args.vs.split(",") if peer]
    order = ["ours", *(f"{peer}_peer" for peer in named), *(["ours"] if set(named) - set(OWN) else [])]
    rows: list[dict] = []
    for script in order:
        add(rows, run(script, work, paths, args.limit), args.out)


def add(rows: list[dict], row: dict, out: str | None) -> None:
    """Judge a row, print it, and write all so far: what is cut off later keeps what it has."""
    rows.append(row)
    row.update(judge(row, rows[0]))
    print_row(row, heading=len(rows) == 1)
    write(rows, out)


def write(rows: list[dict], out: str | None, **more: object) -> None:
    """Rows, the command that gave them, and `more`."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        Path(out).write_text(json.dumps({"command": command, "rows": rows, **more}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--recompute", choices=("none", "selective", "except_attention", "full"), default="none")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--tiled-mlp", type=int, default=0, help="tokens at a time in ours' feed-forward layers")
    parser.add_argument("--budget-gib", type=float, help="ours finds its settings itself; peers have those named")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantize", choices=("nf4", "int8", "fp8"), help="the frozen base below the adapters")
    parser.add_argument("--fp8", choices=("tensorwise", "rowwise"), help="products of the blocks in 8-bit floats")
    parser.add_argument("--qat", choices=("int4", "int8_int4", "fp8"), help="layers computed as they will be rounded")
    parser.add_argument("--attention", default="auto", help="ours' `model.attention`; peers have their own")
    parser.add_argument("--optimizer", default="adamw", help="ours; peers have torch's fused AdamW, states in bf16")
    parser.add_argument("--states", choices=("fp32", "bf16", "int8", "fp8", "int4"), help="of ours' AdamW")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of ours' weights")
    parser.add_argument("--in-backward", action="store_true", help="ours moves parameters in backward")
    parser.add_argument("--cuda-graph", action="store_true", help="ours launches its blocks at once")
    parser.add_argument("--vs", default="", help=f"peers, comma separated: torchtune, trl, unsloth, {', '.join(OWN)}")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=200, help="seconds a contender may take")
    parser.add_argument("--out")
    return parser.parse_args()


def run(script: str, work: dict, paths: dict[str, str], limit: int) -> dict:
    """One contender's row; {"contender", "failed"} with the reason if it gives none."""
    peer = script.removesuffix("_peer")
    if peer == "dequantized":
        script, work = "ours", work | {"quantize": None, "qat": None, "rounded": work["quantize"] or work["qat"]}
    if peer == "usual":
        script, work = "ours", work | {"states": None, "rounding": "nearest"}
    if peer == "bf16":
        script, work = "ours", work | {"fp8": None, "quantize": None}
    path = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    if peer.split("_")[0] in paths:
        path.insert(0, paths[peer.split("_")[0]])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / f"{script}.py"), json.dumps(work)],
            env=env, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"contender": peer, "failed": f"no result within {limit} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not found:
        return {"contender": peer, "failed": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return json.loads(found[-1].removeprefix("ROW ")) | {"contender": "ftlib" if peer == "ours" else peer}


def judge(row: dict, ours: dict) -> dict:
    """Share of the roofline, ratio to our first run, and whether losses and gradients agree with it."""
    if "failed" in row or "failed" in ours:
        return {}
    losses = max(abs(a - b) / b for a, b in zip(row["loss"], ours["loss"], strict=True))
    norms = abs(row["grad_norm"][0] - ours["grad_norm"][0]) / ours["grad_norm"][0]
    alike = all(row["work"].get(key) == ours["work"].get(key) for key in ("fp8", "qat"))
    loss_limit, norm_limit = (2e-3, 2e-2) if alike else (5e-3, 1e-1)
    return {
        "ratio": round(ours["tokens_per_s"] / row["tokens_per_s"], 3),
        "loss_gap": losses,
        "grad_gap": norms,
        "agrees": losses < loss_limit and norms < norm_limit,
        **mfu(row),
    }


def mfu(row: dict) -> dict:
    """4 FLOP a frozen weight and token, 6 a trained one, plus causal attention; recomputation does not count."""
    shape = row["work"]["shape"].removeprefix("tiny-")
    config = json.loads((HERE.parents[1] / "tests/parity/configs" / f"{shape}.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    attention = width * head * (2 * heads + 2 * config["num_key_value_heads"])
    layer = attention + 3 * width * config["intermediate_size"]
    weights = config["num_hidden_layers"] * layer + config["vocab_size"] * width
    scores = 6 * row["work"]["seq_len"] * heads * head * config["num_hidden_layers"]
    rate = row["tokens_per_s"] * ((4 if row["work"]["method"] == "lora" else 6) * weights + scores)
    return {"mfu_measured": round(rate / MEASURED, 3), "mfu_datasheet": round(rate / DATASHEET, 3)}


def print_row(row: dict, heading: bool) -> None:
    if heading:
        print(f"{'contender':12} {'tok/s':>8} {'MFU':>6} {'peak GiB':>9} {'ours/this':>9} {'first s':>8}  agrees")
    if "failed" in row:
        print(f"{row['contender']:12} failed: {row['failed'][-600:]}", flush=True)
        return
    print(
        f"{row['contender']:12} {row['tokens_per_s']:8,} {row.get('mfu_measured', 0):6.1%} {row['peak_gib']:9.2f}"
        f" {row.get('ratio', 0):9.3f} {row['first_step_s']:8.1f}  {row.get('agrees')}"
        f" (loss {row.get('loss_gap', 0):.1e}, gradient {row.get('grad_gap', 0):.1e})",
        flush=True,
    )


if __name__ == "__main__":
    main()
