"""Tokens per second of generation on one GPU, random weights, beside the limit that memory sets and a peer.

    python tools/bench/generate.py --shape llama-3.1-8b --batch 64 --prompt 128 --new 1024
    python tools/bench/generate.py --shape qwen3-0.6b --batch 256 --vs transformers --peer-path transformers=FOLDER

Every contender runs in a process of its own on the same prompts, nobody stops early, and all return log-probabilities.
`limit` is the time to read the weights once a step and all keys and values, at 75 % of the device's memory bandwidth,
and 0.5 ms a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import sft
import torch

HERE = Path(__file__).parent
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s by the vendor's data sheets (SXM)
EFFICIENCY, PER_STEP = 0.75, 0.5e-3  # share of it to be had; s beside memory


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        return contend(json.loads(sys.argv[1]))
    args = arguments()
    keys = ("shape", "batch", "prompt", "new", "group", "rank", "adapter", "attention")
    work = {key: getattr(args, key) for key in keys}
    paths = dict(entry.split("=", 1) for entry in args.peer_path)
    contenders = [*filter(None, args.ours.split(",")), *args.vs]
    print(work, flush=True)
    rows: list[dict] = []
    for name in contenders:
        rows.append(row := run({**work, "contender": name}, paths, args.limit))
        known = next((speed for name, speed in BANDWIDTH.items() if name in row.get("device", "")), None)
        if known:
            row["limit"] = round(limit(work, known))
            row["share_of_limit"] = round(row["tokens_per_s"] / limit(work, known), 3)
        print(json.dumps({key: value for key, value in row.items() if key != "work"}), flush=True)
        sft.write(rows, args.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a config of tests/parity/configs")
    parser.add_argument("--batch", type=int, default=64, help="completions that run at once")
    parser.add_argument("--group", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=1024, help="tokens of a completion")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA adapter on all linears; 0: none")
    parser.add_argument("--adapter", choices=("live", "merged"), default="live", help="how it is applied")
    parser.add_argument("--ours", default="auto", help="values of Engine's `compile`, comma separated: auto,graphs,off")
    parser.add_argument("--vs", nargs="*", default=[], choices=("transformers",))
    parser.add_argument("--attention", default="sdpa", help="the peer's attn_implementation")
    parser.add_argument("--peer-path", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--limit", type=int, default=300, help="seconds a contender may take")
    parser.add_argument("--out")
    return parser.parse_args()


def run(work: dict, paths: dict[str, str], seconds: int) -> dict:
    """One contender's row; {"contender", "failed"} with the reason if it gives none."""
    path = [paths.get(work["contender"], ""), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    try:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(work)], env=env, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"contender": work["contender"], "failed": f"no result within {seconds} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not found:
        return {"contender": work["contender"], "failed": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return json.loads(found[-1].removeprefix("ROW "))


def limit(work: dict, bandwidth: float) -> float:
    """Tokens per second that memory of so many bytes/s allows, at the mean length of the sequences."""
    config = common.config_of(work["shape"])
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    kv = config["num_key_value_heads"]
    layer = width * head * (2 * heads + 2 * kv) + 3 * width * config["intermediate_size"]
    weights = 2 * (config["num_hidden_layers"] * layer + config["vocab_size"] * width)
    cache = 2 * 2 * config["num_hidden_layers"] * kv * head * (work["prompt"] + work["new"] / 2) * work["batch"]
    return work["batch"] / ((weights + cache) / (bandwidth * EFFICIENCY) + PER_STEP)


def contend(work: dict) -> None:
    """Warm up, generate once, and print the row."""
    generator = torch.Generator().manual_seed(0)
    shape = (work["batch"] // work["group"], work["prompt"])
    prompts = torch.randint(3, common.config_of(work["shape"])["vocab_size"], shape, generator=generator).tolist()
    make = transformers if work["contender"] == "transformers" else ours
    start = time.perf_counter()
    generate, versions = make(work)
    generate(prompts, work["new"] // 8)
    torch.cuda.synchronize()
    row = {"contender": work["contender"], "work": work, "first_s": round(time.perf_counter() - start, 1)}
    seconds = {}
    for name, count in (("prefill_s", 1), ("seconds", work["new"])):
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = generate(prompts, count)
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        assert made == work["batch"] * count, (made, work["batch"] * count)
    row |= {name: round(value, 3) for name, value in seconds.items()}
    row["tokens_per_s"] = round(work["batch"] * work["new"] / seconds["seconds"])
    row["decode_tokens_per_s"] = round(
        work["batch"] * (work["new"] - 1) / max(1e-9, seconds["seconds"] - seconds["prefill_s"])
    )
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    row |= {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__, **versions}}
    print("ROW " + json.dumps(row), flush=True)


def ours(work: dict) -> tuple:
    import ftlib
    from ftlib.adapters import lora
    from ftlib.adapters.fuse import fuse
    from ftlib.generation import Engine, SamplingParams
    from ftlib.layers.attention import choose_backend
    from ftlib.models import load

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(common.config_of(work["shape"])))
    model = load.build(folder, torch.bfloat16)
    if work["rank"]:
        lora.attach(model, "all-linear", rank=work["rank"])
    model.to_empty(device="cuda")
    model.tie()
    model.model.init_weights(0)
    model.model.use_attention(choose_backend("auto", torch.device("cuda"), torch.bfloat16, model.arch.softcap))
    if work["rank"]:
        lora.reset(model, 0)
        fuse(model)
    model.requires_grad_(False).eval()
    slots = work["batch"] * (work["prompt"] + work["new"] + 32)
    options = {"compile": work["contender"], "adapter": work["adapter"]}
    engine = Engine(model, max_batch=work["batch"], max_tokens=slots, **options)

    def generate(prompts: list[list[int]], count: int) -> int:
        done = engine.generate(prompts, SamplingParams(count), n=work["group"])
        return sum(len(completion.logprobs) for group in done for completion in group)

    return generate, {"ftlib": ftlib.__version__}


def transformers(work: dict) -> tuple:
    """Its continuous batching, log-probabilities on, its manager kept from call to call and sized for this work: the
    default one fills the memory with pages and makes a mask as long as all of them."""
    import transformers as library
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(common.config_of(work["shape"])))
    torch.set_default_device(common.DEVICE)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16, attn_implementation=work["attention"]
    ).eval()
    torch.set_default_device(None)
    page = 256
    sizes = ContinuousBatchingConfig(
        return_logprobs=True, block_size=page, num_blocks=work["batch"] * -(-(work["prompt"] + work["new"]) // page),
        max_batch_tokens=max(2048, work["batch"]), max_requests_per_batch=work["batch"],
    )  # fmt: skip
    drawing = GenerationConfig(max_new_tokens=work["new"], do_sample=True, eos_token_id=-1, pad_token_id=0)

    def generate(prompts: list[list[int]], count: int) -> int:
        inputs = [prompt for prompt in prompts for _ in range(work["group"])]
        done = model.generate_batch(
            inputs, generation_config=drawing, continuous_batching_config=sizes, persistent_manager=True,
            max_new_tokens=count,
        )  # fmt: skip
        return sum(len(output.generated_tokens) for output in done.values())

    return generate, {"transformers": library.__version__}


if __name__ == "__main__":
    main()
