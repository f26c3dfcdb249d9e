"""The table of README's section on speed, from results/h100_*.json and h200_*.json; of a work in both, the H200's.

python tools/bench/table.py            # print it
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PEERS = {"torchtune": "torchtune 0.6.1", "unsloth": "Unsloth 2026.10.9", "trl": "TRL 1.16 + Liger"}


def main() -> None:
    print("\n".join(lines()))


def results() -> list[Path]:
    """The files of all works, one each."""
    files = {path.stem.partition("_")[2]: path for path in sorted(RESULTS.glob("h[12]00_*.json"))}
    return [path for _, path in sorted(files.items())]


def lines() -> list[str]:
    """Markdown: one row a file, tokens per second (peak GiB); ours is the slower of its two runs."""
    found = [
        "| one H100 or H200, tokens/s (peak GiB) | ftlib | " + " | ".join(PEERS.values()) + " |",
        "|---" * (2 + len(PEERS)) + "|",
    ]
    for path in results():
        rows = json.loads(path.read_text())["rows"]
        ours = min((row for row in rows if row["contender"] == "ftlib"), key=lambda row: row["tokens_per_s"])
        others = {row["contender"]: row for row in rows if row.get("agrees")}
        cells = [cell(ours), *(cell(others[peer]) if peer in others else "" for peer in PEERS)]
        found.append(f"| {title(ours['work'])}, {ours['device'].split()[1]} | " + " | ".join(cells) + " |")
    return found


def cell(row: dict) -> str:
    return f"{row['tokens_per_s']:,} ({row['peak_gib']:.1f})"


def title(work: dict) -> str:
    kept = {"none": "nothing recomputed", "selective": "elementwise recomputed"}.get(work["recompute"], "recomputed")
    if work.get("budget_gib"):
        kept = f"within {work['budget_gib']:g} GiB"
    offload = ", offloaded" if work.get("offload") else ""
    offload += ", AdamW in backward" if work.get("in_backward") else ""
    method = work.get("method", "lora") + (f" on {work['quantize']}" if work.get("quantize") else "")
    method += f" in fp8 {work['fp8']}" if work.get("fp8") else ""
    return f"{work['shape']} {method}, {work['rows']} x {work['seq_len']}, {kept}{offload}"


if __name__ == "__main__":
    main()
