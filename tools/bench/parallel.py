"""Meshes of two GPUs against one GPU of the same machine: speed, memory, exposed communication, and equal numbers.

    python tools/bench/parallel.py --out results/h200x2.json       # all groups, about 8 minutes on two GPUs
    python tools/bench/parallel.py --only lora,full                # lora, long, full, 70b, save, full8b
    python tools/bench/parallel.py --only full8b --peer-path torchtitan=/folder/with/its/packages
    python tools/bench/parallel.py --tiny                          # the same logic on shapes of nothing, CPU is enough

The runs on one GPU share the machine's GPUs, one each, at the same time; those on two come one after the other. Every
case of a group trains the same weights on the same rows, so losses and gradient norms of the first steps must agree
with those of one GPU; the table says so. In `full8b`, where torchtitan has its turn between two of ours, our first run
stands for the one GPU. Cases for which `--budget` leaves no time are named as not started.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).parent
LORA = {"shape": "llama-3.1-8b", "kind": "lora", "rows": 4, "micro_rows": 2, "seq_len": 4096, "recompute": "none"}
LONG = LORA | {"rows": 1, "micro_rows": 1, "seq_len": 65536, "recompute": "full", "warm": 2, "timed": 2}
FULL = LORA | {"shape": "qwen3-1.7b", "kind": "full", "rows": 8, "micro_rows": 2, "recompute": "full"}
BIG = LORA | {"shape": "llama-3.3-70b", "recompute": "full", "warm": 2, "timed": 3}
SAVE = LORA | {"kind": "full", "rows": 8, "recompute": "full", "warm": 2, "timed": 4, "save": ".", "save_wait": 40}
ONE = {"dp_shard": 1}
GROUPS = {
    "lora": (LORA, {"one": ONE, "dp_replicate=2": {"dp_replicate": 2, "dp_shard": 1}, "dp_shard=2": {"dp_shard": 2},
                    "tp=2": {"dp_shard": 1, "tp": 2}, "deterministic": {"dp_replicate": 2, "dp_shard": 1},
                    "elastic": {"dp_replicate": 2, "dp_shard": 1}}),
    "long": (LONG, {"one": ONE, "cp=2": {"dp_shard": 1, "cp": 2}}),
    "full": (FULL, {"one": ONE, "dp_shard=2": {"dp_shard": 2}, "tp=2": {"dp_shard": 1, "tp": 2}}),
    "70b": (BIG, {"dp_shard=2": {"dp_shard": 2}}),
    "save": (SAVE, {"dp_shard=2": {"dp_shard": 2}}),
    "full8b": (LORA | {"kind": "full", "recompute": "full"},
               {"ours": {"dp_shard": 2}, "fp8": {"dp_shard": 2}, "torchtitan": {"dp_shard": 2},
                "ours again": {"dp_shard": 2}}),
}  # fmt: skip
REFERENCES = {"full8b": "ours"}  # what a group is held against, if that is not `one`
BITS = {"deterministic": True, "elastic": "elastic"}


def main() -> None:
    args = arguments()
    cases = {name: work for name, work in all_cases(args).items() if name.split("/")[0] in args.only.split(",")}
    deadline, rows = time.monotonic() + args.budget, {}

    def keep(name: str, row: dict) -> None:
        rows[name] = row
        print(f"{name}: {json.dumps({k: v for k, v in row.items() if k != 'work'})}", flush=True)
        if args.out:
            write(Path(args.out), rows)

    alone = {name: work for name, work in cases.items() if world(work) == 1}
    devices: SimpleQueue[int] = SimpleQueue()
    for device in range(2):
        devices.put(device)

    def on_one(name: str) -> None:
        device = devices.get()
        keep(name, run(alone[name], min(args.limit, deadline - time.monotonic()), device))
        devices.put(device)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(on_one, sorted(alone, key=lambda name: -alone[name]["seq_len"])))
    for name, work in cases.items():
        if name not in alone:
            keep(name, run(work, min(args.limit, deadline - time.monotonic())))
    for name, row in rows.items():
        group = name.split("/")[0]
        row.update(judge(row, rows.get(f"{group}/{REFERENCES.get(group, 'one')}")))
    print_table({name: rows[name] for name in cases})
    if args.out:
        write(Path(args.out), rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = "groups, comma separated; save writes 80 GB into this folder"
    parser.add_argument("--only", default="lora,long,full,70b", help=groups)
    parser.add_argument("--case", default="", help="only cases with one of these in their names, and `one`")
    parser.add_argument("--attention", default="auto", help="`model.attention`")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see whether it all runs")
    parser.add_argument("--budget", type=float, default=440, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one case")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--out")
    return parser.parse_args()


def all_cases(args: argparse.Namespace) -> dict[str, dict]:
    """`group/mesh` -> the work, as a process of parallel_step.py reads it."""
    paths, found = dict(entry.split("=", 1) for entry in args.peer_path), {}
    for group, (work, meshes) in GROUPS.items():
        for name, mesh in meshes.items():
            case = f"{group}/{name}"
            if name != REFERENCES.get(group, "one") and not any(part in name for part in args.case.split(",")):
                continue
            more = {"case": case, "mesh": mesh, "tiny": args.tiny, "trace": True}
            more |= {"deterministic": BITS.get(name, False), "attention": args.attention}
            more |= {"fp8": "tensorwise"} if name == "fp8" else {}
            if name == "torchtitan":
                more["peer"] = {"script": f"{name}_peer", "path": paths.get(name, "")}
            found[case] = {"warm": 3, "timed": 7} | work | more | ({"seq_len": 64} if args.tiny else {})
    return found


def world(work: dict) -> int:
    sizes = work["mesh"]
    return sizes.get("dp_replicate", 1) * sizes["dp_shard"] * sizes.get("cp", 1) * sizes.get("tp", 1)


def run(work: dict, limit: float, device: int | None = None) -> dict:
    """The row of one case, or {"failed": why}. `device`: the GPU of a case of one process."""
    count = world(work)
    if limit < 10:
        return {"work": work, "failed": "not started: out of time"}
    launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    peer = work.get("peer", {"script": "parallel_step", "path": ""})
    path = os.pathsep.join([peer["path"], str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    env.setdefault("OMP_NUM_THREADS", "4")
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(device)
    command = [sys.executable, *launcher, str(HERE / f"{peer['script']}.py")]
    command.append(json.dumps(work | {"launched": time.time()}))
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, errors = process.communicate()
        return {"work": work, "failed": f"no result within {limit:.0f} s: {errors.strip()[-1500:]}"}
    found = [line for line in out.splitlines() if line.startswith("ROW ")]
    if not found:
        return {"work": work, "failed": (errors.strip() or out.strip())[-3000:]}
    return json.loads(found[-1].removeprefix("ROW "))


def judge(row: dict, one: dict | None) -> dict:
    """Speed against one GPU, and whether losses and gradient norms agree with it."""
    if one is None or "loss" not in row or "loss" not in one:  # failed, or was not started
        return {}
    losses = max(abs(a - b) / abs(b) for a, b in zip(row["loss"], one["loss"], strict=True))
    norms = max(abs(a - b) / abs(b) for a, b in zip(row["grad_norm"], one["grad_norm"], strict=True))
    return {
        "times_one": round(row["tokens_per_s"] / one["tokens_per_s"], 3),
        "loss_gap": losses,
        "grad_gap": norms,
        "agrees": losses < 2e-3 and norms < 2e-2 if not row["work"].get("fp8") else losses < 5e-3 and norms < 1e-1,
    }


def print_table(rows: dict[str, dict]) -> None:
    titles = ("tok/s", "per GPU", "x one", "peak GiB", "NCCL ms", "exposed")
    print(f"\n{'case':22} " + " ".join(f"{title:>8}" for title in titles) + "  agrees")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:22} failed: {row['failed'][-400:]}")
            continue
        speed = row["tokens_per_s"]
        numbers = [row.get(key) for key in ("times_one", "peak_gib", "nccl_ms", "exposed_nccl_ms")]
        shown = [f"{speed:,.0f}", f"{speed / row['processes']:,.0f}", *("" if n is None else str(n) for n in numbers)]
        gaps = f"(loss {row['loss_gap']:.1e}, gradient {row['grad_gap']:.1e})" if "loss_gap" in row else ""
        print(f"{name:22} " + " ".join(f"{text:>8}" for text in shown) + f"  {row.get('agrees', '')} {gaps}")


def write(out: Path, rows: dict[str, dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
