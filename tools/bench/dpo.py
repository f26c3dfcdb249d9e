"""DPO on one GPU: our step, with shared prompts (and products in fp8), TRL's, ours again, in processes of their own.

    python tools/bench/dpo.py --shape llama-3.1-8b --peer-path trl=/folder/with/its/packages --out results/NAME.json
    python tools/bench/dpo.py --tiny --vs ""        # does it run at all? on a CPU, in seconds

Low-rank adapters on random weights, equal pairs in the same order; a figure counts only if all begin at ln 2 and the
first gradients agree (10 % apart at most in fp8, 5 % else).
"""

import argparse
import math
import sys

import sft


def main() -> None:
    args = arguments()
    keys = ("pairs", "prompt_tokens", "answer_tokens", "recompute", "rank", "offload")
    work = {key: getattr(args, key) for key in keys} | {"method": "lora", "share": False}
    if args.tiny:
        work |= {"pairs": 2, "prompt_tokens": 24, "answer_tokens": 16}
    side = work["prompt_tokens"] + work["answer_tokens"]
    work |= {"shape": f"tiny-{args.shape}" if args.tiny else args.shape, "rows": 2 * work["pairs"], "seq_len": side}
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    peers = [peer for peer in args.vs.split(",") if peer]
    rows: list[dict] = []
    in_fp8 = [f"ftlib, shared, {args.fp8} fp8"] if args.fp8 else []
    for name in ("ftlib", "ftlib, shared", *in_fp8, *peers, "ftlib"):
        script = "dpo_ours" if name.startswith("ftlib") else f"{name}_dpo_peer"
        own = {"share": "shared" in name, "fp8": args.fp8 if name in in_fp8 else None}
        row = sft.run(script, work | own, paths, args.limit) | {"contender": name}
        rows.append(row | judge(row, rows[0] if rows else row))
        print_row(rows[-1], heading=len(rows) == 1)
        sft.write(rows, args.out)
    if any("failed" in row for row in rows):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--pairs", type=int, default=4, help="of one step, which is one forward of all of them")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=512)
    parser.add_argument("--recompute", choices=("none", "selective", "except_attention", "full"), default="full")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--fp8", choices=("tensorwise", "rowwise"), help="one more run of ours, its products in fp8")
    parser.add_argument("--vs", default="trl", help="peers, comma separated: trl; empty for ours alone")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=200, help="seconds a contender may take")
    parser.add_argument("--tiny", action="store_true", help="sizes shrunk until a CPU does it in seconds")
    parser.add_argument("--out")
    return parser.parse_args()


def judge(row: dict, ours: dict) -> dict:
    """Pairs a second, beside our first run's; of shared prompts also what the saved tokens alone would give."""
    if "failed" in row or "failed" in ours:
        return {}
    work = row["work"]
    first = max(abs(r["loss"][0] - math.log(2)) for r in (row, ours))
    norms = abs(row["grad_norm"][0] - ours["grad_norm"][0]) / ours["grad_norm"][0]
    found = {
        "pairs_per_s": round(1e3 * work["pairs"] / row["step_ms"], 2),
        "ratio": round(row["step_ms"] / ours["step_ms"], 3),
        "first_loss_gap": first,
        "second_loss": row["loss"][1],
        "grad_gap": norms,
        "agrees": first < 1e-3 and norms < (0.1 if work["fp8"] else 5e-2),
    }
    if work["share"]:
        prompt, answer = work["prompt_tokens"], work["answer_tokens"]
        ideal = 2 * (prompt + answer) / (prompt + 2 * answer)
        found |= {"ideal_speed_up": round(ideal, 3), "share_of_ideal": round(1 / found["ratio"] / ideal, 3)}
    return found


def print_row(row: dict, heading: bool) -> None:
    if heading:
        print(f"{'contender':30} {'pairs/s':>8} {'peak GiB':>9} {'ours faster by':>14} {'first s':>8}  agrees")
    if "failed" in row:
        return print(f"{row['contender']:30} failed: {row['failed'][-600:]}", flush=True)
    ideal = f", {row['share_of_ideal']:.2f} of the ideal {row['ideal_speed_up']}" if "share_of_ideal" in row else ""
    losses = f"first loss {row['loss'][0]:.6f}, second {row['loss'][1]:.4f}"
    print(
        f"{row['contender']:30} {row.get('pairs_per_s', 0):8} {row['peak_gib']:9.2f} {row.get('ratio', 0):14.3f}"
        f" {row['first_step_s']:8.1f}  {row.get('agrees')} ({losses},"
        f" gradient {row['grad_norm'][0]:.4f}, apart {row.get('grad_gap', 0):.1e}{ideal})",
        flush=True,
    )


if __name__ == "__main__":
    main()
