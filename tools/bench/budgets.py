"""Each contender's best setting within budgets of GPU memory, all settings measured by one command.

    python tools/bench/budgets.py --shape llama-3.1-8b --vs torchtune,unsloth --out results/NAME.json
    python tools/bench/budgets.py --shape qwen3-1.7b --method full --rows 4 --in-backward --vs trl
    python tools/bench/budgets.py --shape tiny-qwen3-0.6b --seq-len 64 --vs ''      # does it run at all? on a CPU

Ours runs with every setting of --settings (`+` puts tensors into host memory), peers with all kept and all recomputed,
each as in sft.py: the same weights and tokens, losses and gradients of the first steps agreeing. `memory.budget_gib`
finds ours' setting for a run by itself.
"""

import argparse

import sft

PEERS = ("none", "full")  # peers keep everything, or recompute everything their own way


def main() -> None:
    args = arguments()
    work = {key: getattr(args, key) for key in ("shape", "method", "rows", "seq_len", "rank", "quantize")}
    work |= {"attention": args.attention, "optimizer": "adamw", "states": None, "rounding": "nearest"}
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    mine = [("ours", setting) for setting in args.settings.split(",")]
    theirs = [(f"{peer}_peer", setting) for setting in PEERS for peer in args.vs.split(",") if peer]
    rows: list[dict] = []
    for script, setting in (mine[0], *theirs, *mine[1:], *(mine[:1] if theirs else [])):
        recompute, offload = setting.removesuffix("+"), setting.endswith("+")
        in_backward = args.in_backward and recompute != "none"
        wanted = work | {"recompute": recompute, "offload": offload, "in_backward": in_backward}
        sft.add(rows, sft.run(script, wanted, paths, args.limit) | {"setting": setting}, args.out)
        print(f"{'':12} {setting}", flush=True)
    found = table(rows, [float(budget) for budget in args.budgets.split(",")])
    print("\n".join(found))
    sft.write(rows, args.out, table=found)


def table(rows: list[dict], budgets: list[float]) -> list[str]:
    """Markdown: a row a budget, the fastest setting of each contender that stays below it; of two runs of ours, the
    slower."""
    names = list(dict.fromkeys(row["contender"] for row in rows if "failed" not in row))
    found = [f"| GiB | {' | '.join(names)} | ours / best peer |", "|---" * (len(names) + 2) + "|"]
    for budget in budgets:
        best = {name: fastest([row for row in rows if row["contender"] == name], budget) for name in names}
        peers = [row["tokens_per_s"] for name, row in best.items() if row and name != "ftlib"]
        ratio = f"{best['ftlib']['tokens_per_s'] / max(peers):.3f}" if peers and best["ftlib"] else ""
        cells = [
            f"{row['tokens_per_s']:,} ({row['peak_gib']:.1f}, {row['setting']})" if row else "does not fit"
            for row in best.values()
        ]
        found.append(f"| {budget:g} | {' | '.join(cells)} | {ratio} |")
    return found


def fastest(rows: list[dict], budget: float) -> dict | None:
    """The best of those that count and fit, a setting that ran twice by its slower run."""
    slower: dict[str, dict] = {}
    for row in sorted((row for row in rows if row.get("agrees")), key=lambda row: -row["tokens_per_s"]):
        slower[row["setting"]] = row
    fitting = [row for row in slower.values() if row["peak_gib"] <= budget]
    return max(fitting, key=lambda row: row["tokens_per_s"], default=None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantize", choices=("nf4", "int8", "fp8"))
    parser.add_argument("--attention", default="auto", help="ours' `model.attention`")
    parser.add_argument("--in-backward", action="store_true", help="ours, wherever anything is recomputed")
    parser.add_argument("--settings", default="none,selective,except_attention+", help="ours', the first one twice")
    parser.add_argument("--budgets", default="16,24,48,75", help="GiB")
    parser.add_argument("--vs", default="torchtune,unsloth", help="peers, comma separated")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=120, help="seconds a contender may take")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
