"""Real conversations, real tokens counted: ours, TRL and Unsloth on one GPU, each keeping documents apart its own way.

    python tools/bench/packed.py --tokenizer FOLDER --data FILE.json FILE.jsonl --save documents.npz
    python tools/bench/packed.py --documents documents.npz --recompute none --vs trl,unsloth --out results/NAME.json
    python tools/bench/packed.py --tiny --vs ""             # does it run at all? on a CPU, in seconds

Conversations are tokenised once, prompts masked, and dealt to steps of equally many documents, the same for everyone:
losses and gradient norms of the first steps must agree. Ours packs them into --rows rows of --seq-len. TRL and Unsloth
put them side by side without padding (`padding_free`), on FlashAttention-2 by tools/bench/shims; `trl_padded` and
`unsloth_padded` fill them up to the longest of a quarter of the step instead. A token is a document's; padding is none.

Steps are drawn at random; then the largest and the smallest exchange documents until all have as many tokens, so that a
fixed number fills the same few rows each time. Fewer documents than the steps need are read again. Where the data are
not at hand (`../shared/data`), `--documents`, or the environment's PACKED_DOCUMENTS, names a file of `--save`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import sft

sys.path.insert(0, str(sft.HERE.parents[1]))
from ftlib import data, tokenizers
from ftlib.data.packing import pack, shuffled
from ftlib.sections import Data, Source

DEMO = Path(data.__file__).parents[1] / "assets" / "demo"
SHIMS = sft.HERE / "shims"
INSTRUCT = sft.HERE.parents[2] / "shared" / "data"
FILES = ("lf_alpaca_en_demo.json", "lf_glaive_toolcall_en_demo.json", "lf_reason_tool_use_demo_50.jsonl")
TINY = {"rank": 4, "rows": 2, "seq_len": 256, "steps": 8}


def main() -> None:
    args = arguments()
    work = {key: getattr(args, key) for key in ("shape", "recompute", "rank", "rows", "seq_len", "steps")}
    work |= {"method": "lora", "offload": args.offload, "cuda_graph": args.cuda_graph, "padded": False}
    work |= {"attention": args.attention}
    if args.tiny:
        work |= TINY | {"shape": f"tiny-{args.shape}"}
        args.documents, args.data, args.tokenizer = None, [str(DEMO / "data" / "lora_eval.jsonl")], str(DEMO / "model")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.documents or args.save or f"{folder}/documents.npz").absolute()
        if not args.documents:
            prepare(file, args.data, args.tokenizer, args.template, work)
        if not args.save:
            compare(work | {"documents": str(file)} | sizes(file, work["steps"]), args)


def compare(work: dict, args: argparse.Namespace) -> None:
    """Ours, the peers, ours again: judge, print and write each row as it comes."""
    given = dict(entry.split("=", 1) for entry in args.peer_path)
    peers = [peer for peer in args.vs.split(",") if peer]
    paths = {peer: os.pathsep.join([str(SHIMS), *filter(None, [given.get(peer)])]) for peer in ("trl", "unsloth")}
    rows: list[dict] = []
    print(f"{'contender':15} {'tok/s':>8} {'peak GiB':>9} {'ours/this':>9} {'padding':>8} {'first s':>8}  agrees")
    for name in ("ftlib", *peers, *(["ftlib"] if peers else [])):
        script = "packed_ours" if name == "ftlib" else f"{name.removesuffix('_padded')}_peer"
        row = sft.run(script, work | {"padded": name.endswith("_padded")}, paths, args.limit) | {"contender": name}
        rows.append(row)
        row.update({key: value for key, value in sft.judge(row, rows[0]).items() if "mfu" not in key})
        print_row(row)
        sft.write(rows, args.out)


def prepare(file: Path, files: list[str], tokenizer: str, template: str | None, work: dict) -> None:
    """Write `ids` uint32 and `trained` bool [tokens], `lengths` int32 [documents] and `about` (JSON) of all steps."""
    reader = tokenizers.from_pretrained(tokenizer)
    if template or reader.chat_template is None:
        reader.chat_template = tokenizers.load_template(template or "chatml")
    sources = tuple(Source(path=path) for path in files)
    found = data.load(Data(sources=sources, seq_len=work["seq_len"], cache="none"), reader, seed=0).train
    chosen, number = deal(found.lengths, work["rows"], work["seq_len"], work["steps"])
    parts, lengths = [found.masked(i) for i in chosen], found.lengths[chosen]
    starts = np.cumsum(lengths) - lengths
    ids, trained = (np.concatenate(half) for half in zip(*parts, strict=True))
    trained[starts] = False  # nothing is before them to learn it from
    low, middle, high = np.percentile(lengths, (5, 50, 95)).tolist()
    about = {
        "files": [Path(path).name for path in files], "conversations": len(found), "tokens": int(lengths.sum()),
        "trained": round(float(trained.mean()), 3), "documents_per_step": number,
        "lengths": {
            "mean": round(float(lengths.mean()), 1), "5 %": low, "median": middle, "95 %": high,
            "longest": int(lengths.max()),
        },
        **{key: work[key] for key in ("steps", "rows", "seq_len")},
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    np.savez_compressed(
        file, ids=ids.astype(np.uint32), trained=trained, lengths=lengths.astype(np.int32), about=json.dumps(about)
    )


def deal(lengths: np.ndarray, rows: int, seq_len: int, steps: int) -> tuple[np.ndarray, int]:
    """Indices of documents, step after step, and how many a step has: the most whose every step fits the rows.

    The number is a multiple of four (micro batches of padded contenders).
    """
    number = int(rows * seq_len / lengths.mean()) // 4 * 4
    while number:
        passes = -(-number * steps // len(lengths))
        line = np.concatenate([shuffled(len(lengths), 0, i) for i in range(passes)])[: number * steps]
        line = level(line.reshape(steps, number), lengths)
        if all(len(pack(lengths[step], seq_len, 0, 0)) <= rows for step in line):
            return line.reshape(-1), number
        number -= 4
    raise SystemExit(f"four documents of {lengths.mean():.0f} tokens need more than {rows} rows of {seq_len}")


def level(line: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`line` [steps, documents] with documents of the largest and the smallest step exchanged until all are of one
    size, the longest of each step first."""
    for _ in range(50 * len(line)):
        held = lengths[line].sum(1)
        big, small = held.argmax(), held.argmin()
        excess = (held[big] - held[small]) / 2
        if excess < 4:
            break
        moved = lengths[line[big]][:, None] - lengths[line[small]]
        i, j = divmod(int(np.abs(moved - excess).argmin()), line.shape[1])
        line[big, i], line[small, j] = line[small, j], line[big, i]
    return np.take_along_axis(line, np.argsort(-lengths[line], 1, kind="stable"), 1)


def sizes(file: Path, steps: int) -> dict:
    """What the file was made for; of its steps as many as are asked for."""
    with np.load(file) as arrays:
        about = json.loads(str(arrays["about"]))
    return {"rows": about["rows"], "seq_len": about["seq_len"], "steps": min(about["steps"], steps)}


def print_row(row: dict) -> None:
    """One contender's line."""
    if "failed" in row:
        print(f"{row['contender']:15} failed: {row['failed'][-600:]}", flush=True)
        return
    print(
        f"{row['contender']:15} {row['tokens_per_s']:8,} {row['peak_gib']:9.2f} {row.get('ratio', 0):9.3f}"
        f" {row['padding']:8.1%} {row['first_step_s']:8.1f}  {row.get('agrees')}"
        f" (loss {row.get('loss_gap', 0):.1e}, gradient {row.get('grad_gap', 0):.1e})",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--data", nargs="+", default=[str(INSTRUCT / "instruct" / name) for name in FILES])
    parser.add_argument("--tokenizer", default=str(INSTRUCT / "tokenizers" / "qwen"), help="folder or file")
    parser.add_argument("--template", help="chat template; by default the tokenizer's own, or chatml")
    parser.add_argument("--documents", default=os.environ.get("PACKED_DOCUMENTS"), help="a file of --save instead")
    parser.add_argument("--save", help="write the documents there, and stop")
    parser.add_argument("--rows", type=int, default=4, help="that the documents of a step fill")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", choices=("none", "selective", "except_attention", "full"), default="none")
    parser.add_argument("--offload", action="store_true", help="ours")
    parser.add_argument("--cuda-graph", action="store_true", help="ours launches its blocks at once")
    parser.add_argument("--attention", default="auto", help="ours' `model.attention`")
    parser.add_argument("--vs", default="trl,unsloth", help="of trl, trl_padded, unsloth, unsloth_padded")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=150, help="seconds a contender may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
