"""GRPO on one GPU: where the time and the memory of a step go, ours beside TRL's, each in its own process.

    python tools/bench/grpo.py --peer-path trl=/folder/with/its/packages --out results/NAME.json
    python tools/bench/grpo.py --shape llama-3.1-8b --vs "" --quantize none,nf4        # what an 8B shape needs
    python tools/bench/grpo.py --tiny --vs ""               # does it run at all? on a CPU, in seconds

Random weights of a published shape, low-rank adapters (--rank 0: every weight), prompts and completions of fixed
lengths, a reward that looks at nothing. Figures are medians of the steps behind the first.
"""

import argparse
import sys

import sft

SIZES = ("rank", "prompts", "group", "prompt_tokens", "new_tokens", "seq_len", "micro_rows", "steps", "recompute")
TINY = {
    "prompts": 2, "group": 2, "prompt_tokens": 12, "new_tokens": 8, "seq_len": 64, "micro_rows": 1, "steps": 2,
    "rank": 4,
}  # fmt: skip
COLUMNS = {
    "drawn_tokens_per_s": "drawn tok/s", "samples_per_s": "samples/s", "step_s": "step s",
    "seconds/generate": "drawing s", "seconds/train": "learning s", "peak_gib": "peak GiB", "first_step_s": "first s",
}  # fmt: skip


def main() -> None:
    args = arguments()
    work = {key: getattr(args, key) for key in SIZES} | {"quantize": None, "shape": args.shape}
    if args.tiny:
        work |= TINY | {"shape": f"tiny-{args.shape}"}
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    peers = [peer for peer in args.vs.split(",") if peer]
    ours = [("ftlib" + (f", {form}" if form else ""), form) for form in map(bare, args.quantize.split(","))]
    rows: list[dict] = []
    print(f"{'contender':14}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
    for name, form in (*ours, *((peer, None) for peer in peers), *(ours[:1] if peers else ())):
        script = "grpo_ours" if name.startswith("ftlib") else f"{name}_grpo_peer"
        rows.append(sft.run(script, work | {"quantize": form}, paths, args.limit) | {"contender": name})
        print_row(rows[-1])
        sft.write(rows, args.out)
    if any("failed" in row for row in rows):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; 0: every weight trains")
    parser.add_argument("--prompts", type=int, default=8, help="of one step")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048, help="of a packed row of the update")
    parser.add_argument("--micro-rows", type=int, default=2, help="packed rows in one forward")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recompute", choices=("none", "selective", "except_attention", "full"), default="full")
    parser.add_argument("--quantize", default="none", help="our frozen base: none, nf4, …; several, comma separated")
    parser.add_argument("--vs", default="trl", help="peers, comma separated: trl; empty for ours alone")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=240, help="seconds a contender may take")
    parser.add_argument("--tiny", action="store_true", help="sizes shrunk until a CPU does it in seconds")
    parser.add_argument("--out")
    return parser.parse_args()


def bare(form: str) -> str | None:
    return None if form == "none" else form


def print_row(row: dict) -> None:
    if "failed" in row:
        print(f"{row['contender']:14} failed: {row['failed'][-600:]}", flush=True)
    else:
        print(f"{row['contender']:14}" + "".join(f"{row[key]:12,}" for key in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
