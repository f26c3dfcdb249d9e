"""A 70B shape on eight GPUs: what each run should take, and the runs themselves on as many GPUs as there are.

    python tools/bench/headline.py --plan                            # on any machine: memory, communication, speed
    python tools/bench/headline.py --out tools/bench/results/headline.json --save /scratch       # on 2, 4, 8, … GPUs
    python tools/bench/headline.py --only 70b --gpus 8               # some groups; --tiny for shapes of nothing

Random weights, made on the devices. Each case is started by torchrun in processes of its own, so that one that fails
leaves the others alone; each row is written when it is there. What would not fit, or does not go together, is a row
that says so. `--save` names a folder for two sharded checkpoints of a case (as large as the row's plan says).
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import estimate  # noqa: E402 - after the path is set
import parallel  # noqa: E402
from parallel import world  # noqa: E402
from sft import mfu  # noqa: E402

from ftlib import preflight  # noqa: E402
from ftlib.errors import UserError  # noqa: E402

PLAN = HERE / "results" / "headline_plan.json"
GIB = 2**30
CARDS = {"64 GiB": 64, "80 GB card": 78, "141 GB card": 139}  # GiB that a process can have of them
LORA = {"shape": "llama-3.3-70b", "kind": "lora", "seq_len": 4096, "recompute": "full", "warm": 2, "timed": 3}
LONG = LORA | {"seq_len": 32768, "timed": 2}
FULL = LORA | {"shape": "llama-3.1-8b", "kind": "full", "timed": 5}
QUANTIZED = {"quantize": "nf4"}
GROUPS = {  # work, and the meshes it runs on
    "70b": (LORA, ("fsdp", "fsdp-tp2")),
    "70b-32k": (LONG, ("fsdp-cp2",)),
    "70b-qlora": (LORA | QUANTIZED, ("fsdp", "fsdp-tp2")),
    "70b-qlora-32k": (LONG | QUANTIZED, ("fsdp-cp2",)),
    "8b-full": (FULL, ("fsdp",)),
}
SAVED = ("70b/fsdp", "8b-full/fsdp")


def main() -> None:
    args = arguments()
    there = torch.cuda.device_count() if torch.cuda.is_available() else None
    gpus = args.gpus or (8 if args.plan else there or 2)
    if gpus % 2 or set(args.only.split(",")) - GROUPS.keys() or (not args.plan and there and gpus > there):
        print(f"--gpus {gpus}: an even number of those that are here; --only: of {', '.join(GROUPS)}")
        sys.exit(2)
    if args.plan:
        plan(gpus, Path(args.out or (PLAN if gpus == 8 else PLAN.with_stem(f"headline_plan_{gpus}"))))
        return
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict] = {}
    deadline, link = time.monotonic() + args.budget, estimate.link()
    for name, work in cases(gpus, args.only.split(","), args.tiny).items():
        left = min(args.limit, deadline - time.monotonic())
        rows[name] = {"work": work} | measured(name, work, left, args.save, link)
        rows[name] |= compared(name, rows)
        print(f"{name}: {json.dumps({k: v for k, v in rows[name].items() if k != 'work'})}", flush=True)
        if args.out:
            parallel.write(Path(args.out), rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="run nothing: print and write what to expect")
    parser.add_argument("--gpus", type=int, default=0, help="default: all there are; a plan's 8; 2 processes on a CPU")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, comma separated")
    parser.add_argument("--save", default="", help="folder for the checkpoints; left out: none are written")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see whether it all runs")
    parser.add_argument("--budget", type=float, default=3000, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one case")
    parser.add_argument("--out")
    return parser.parse_args()


def cases(gpus: int, groups: list[str], tiny: bool = False) -> dict[str, dict]:
    """`group/mesh@processes` -> the work as parallel.py reads it: `gpus` processes, and FSDP on 1 and 2 beside them.
    Each GPU has 2 x 4096 tokens a step, or half of a row of 32,768, whatever the mesh."""
    found = {}
    for group in groups:
        work, meshes = GROUPS[group]
        for mesh in meshes:
            for count in sorted({1, 2, gpus} if mesh == "fsdp" else {gpus}):
                name, tp, cp = f"{group}/{mesh}@{count}", 2 if "tp" in mesh else 1, 2 if "cp" in mesh else 1
                rows = 1 if cp > 1 else 2 * tp
                case = {"case": name, "mesh": {"dp_shard": count // (tp * cp), "tp": tp, "cp": cp}, "micro_rows": rows}
                case |= {"rows": rows * count // (tp * cp), "tiny": tiny, "trace": True, "deterministic": False}
                found[name] = work | case | ({"seq_len": 64, "warm": 1, "timed": 1} if tiny else {})
    return found


def measured(name: str, work: dict, limit: float, save: str, link: float) -> dict:
    """The row of a case, or why there is none."""
    try:
        expected = estimate.estimate(work, link)
    except UserError as error:
        return {"skipped": " ".join(str(error).split())}
    where, have, _ = preflight.available()
    wanted = expected.total * (1 if where == "the GPU" else world(work))
    planned = {"plan_gib": gib(expected.total)}
    planned |= {} if work["tiny"] else {"plan_tokens_per_s_per_gpu": round(expected.per_gpu)}
    if wanted > have:
        return planned | {"skipped": f"about {gib(wanted)} GiB are needed, {where} has {gib(have)}"}
    if save and name.split("@")[0] in SAVED:
        free = shutil.disk_usage(save).free
        if free > 1.1 * expected.checkpoint:
            work = work | {"save": save, "save_wait": 120}
        else:
            planned["not_saved"] = f"a checkpoint is {gib(expected.checkpoint)} GiB, {save} has {gib(free)} free"
    row = parallel.run(work, limit)
    if "failed" in row:
        return planned | {"failed": row["failed"]}
    speed = row["tokens_per_s"] / row["processes"]
    row |= planned | {"tokens_per_s_per_gpu": round(speed, 1)}
    if torch.cuda.is_available() and not work["tiny"]:
        row |= mfu({"work": work | {"method": work["kind"]}, "tokens_per_s": speed})
    return row


def compared(name: str, rows: dict[str, dict]) -> dict:
    """Speed against the same case on 1 and 2 GPUs; whether losses and gradients agree with FSDP on as many."""
    row, (case, count) = rows[name], name.split("@")
    if "tokens_per_s" not in row:
        return {}
    found = {}
    for fewer in (1, 2):
        other = rows.get(f"{case}@{fewer}", {})
        if "tokens_per_s" in other and fewer < int(count):
            found[f"times_{fewer}"] = round(row["tokens_per_s"] / other["tokens_per_s"], 3)
    same = f"{case.split('/')[0]}/fsdp@{count}"
    alike = parallel.judge(row, rows.get(same)) if same != name else {}
    return found | {key: alike[key] for key in ("loss_gap", "grad_gap", "agrees") if key in alike}


def plan(gpus: int, out: Path) -> None:
    """Print and write what each run should take, and how far the same estimate is from what was measured."""
    link = estimate.link()
    found = {"link_bytes_per_s": {k: round(v / 1e9) * 10**9 for k, v in estimate.link_rates().items()}}
    found |= {"runs": {name: planned(work, link) for name, work in cases(gpus, list(GROUPS)).items()}}
    found |= {"checks": checks(link)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    rates = ", ".join(f"{name} {round(value / 1e9)}" for name, value in found["link_bytes_per_s"].items())
    print("\n".join(["GB/s that each of two H200s received: " + rates, "", *tables(found)]))


def planned(work: dict, link: float) -> dict:
    """One row of the plan."""
    try:
        made = estimate.estimate(work, link)
    except UserError as error:
        return {"work": work, "refused": " ".join(str(error).split())}
    return {
        "work": work,
        "memory_gib": {name: gib(size) for name, size in made.memory.items() if size},
        "peak_at": made.peak,
        "total_gib": gib(made.total),
        "fits": [card for card, size in CARDS.items() if made.total <= size * GIB],
        "checkpoint_gib": gib(made.checkpoint),
        "received_gib_per_step": {name: gib(size) for name, size in made.bytes.items()},
        "compute_s": {name: round(value, 3) for name, value in made.seconds.items() if value},
        "exposed_s": {name: round(value, 3) for name, value in made.exposed.items()},
        "step_s": round(made.step, 3),
        "tokens_per_s_per_gpu": round(made.per_gpu),
        "mfu_measured": made.mfu(),
    }


def checks(link: float) -> dict[str, dict]:
    """The estimate of what was measured on one GPU and two: both numbers and the error, in percent."""
    found = {}
    for name, row in measured_rows().items():
        made = estimate.estimate(row["work"], link)
        speed = row["tokens_per_s"] / world(row["work"])
        found[name] = {
            "tokens_per_s_per_gpu": [round(made.per_gpu), round(speed)],
            "speed_error_percent": round(100 * (made.per_gpu / speed - 1), 1),
            "gib": [gib(made.total), row["peak_gib"]],
            "memory_error_percent": round(100 * (made.total / GIB / row["peak_gib"] - 1), 1),
        }
        if "exposed_nccl_ms" in row:
            found[name]["exposed_ms"] = [round(1e3 * sum(made.exposed.values()), 1), row["exposed_nccl_ms"]]
    return found


def measured_rows() -> dict[str, dict]:
    """Our rows in results/ but for those in fp8, whose speed is not estimated; their work as parallel.py writes it."""
    found = {}
    for path in sorted((HERE / "results").glob("h100_*.json")):
        row = next(row for row in json.loads(path.read_text())["rows"] if row["contender"] == "ftlib")
        if row["work"].get("fp8"):
            continue
        work = {"kind": row["work"].get("method", "lora"), "micro_rows": row["work"]["rows"], "mesh": {"dp_shard": 1}}
        found[path.stem] = row | {"work": row["work"] | work}
    meshes = json.loads((HERE / "results" / "h200x2_meshes.json").read_text())["rows"]
    return found | {f"h200 {name}": row for name, row in meshes.items()}


def tables(found: dict) -> list[str]:
    """Markdown: the plan, then the checks."""
    cards = list(CARDS)
    lines = ["| run | GiB a GPU (weights, optimizer, gradients, activations, logits, gathered) | "
             + " | ".join(cards) + " | received, GiB a step | compute, s | exposed, s | tok/s a GPU | MFU |",
             "|---" * (7 + len(cards)) + "|"]  # fmt: skip
    kinds = ("weights", "optimizer", "gradients", "activations", "logits", "gathered")
    for name, row in found["runs"].items():
        if "refused" in row:
            lines.append(f"| {name} | refused: {row['refused']} |" + " |" * (5 + len(cards)))
            continue
        parts = ", ".join(str(row["memory_gib"].get(kind, 0)) for kind in kinds)
        fits = " | ".join("yes" if card in row["fits"] else "no" for card in cards)
        received = ", ".join(f"{kind} {size}" for kind, size in row["received_gib_per_step"].items())
        spent = f"{sum(row['compute_s'].values()):.2f} | {sum(row['exposed_s'].values()):.2f}"
        speed = f"{row['tokens_per_s_per_gpu']:,} | {row['mfu_measured']:.1%}"
        lines.append(f"| {name} | {row['total_gib']} ({parts}) | {fits} | {received} | {spent} | {speed} |")
    lines += ["", "| measured | tok/s a GPU: estimate, measured | error | GiB: estimate, measured | error |"]
    lines.append("|---" * 5 + "|")
    for name, row in found["checks"].items():
        (speed, ran), (size, peak) = row["tokens_per_s_per_gpu"], row["gib"]
        errors = row["speed_error_percent"], row["memory_error_percent"]
        lines.append(f"| {name} | {speed:,}, {ran:,} | {errors[0]:+.1f} % | {size}, {peak} | {errors[1]:+.1f} % |")
    return lines


def gib(size: float) -> float:
    return round(size / GIB, 1) if size >= GIB else round(size / GIB, 3)


if __name__ == "__main__":
    main()
