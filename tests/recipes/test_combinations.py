"""Options that share state, together: a run that goes on from a checkpoint is the run that was never stopped.

Found by some hundred random combinations of options; these are pairs that one of them alone does not try.
"""

import json

import pytest
from tiny_model import train, undo, write_config, write_model

CLOCKED = ("tokens_per_s", "data_wait", "mfu", "peak_memory_gib")
FREE = ("optim.name=schedule_free", "schedule.name=constant")
RUNS = {
    "averages, in backward, the best kept": (
        "full_sft", *FREE, "optim.in_backward=true", "optim.max_grad_norm=null", "eval.every=1",
        "checkpoint.keep_best=true"),
    "averages of a shared prompt's losses, reference cached": (
        "dpo", *FREE, "lora=null", "dpo.loss=mpo", "dpo.reference=cache", "dpo.share_prompt=true"),
    "layers asleep, the best kept, state away": (
        "full_sft", "lisa={layers: 1, every: 2}", "optim.offload=true", "eval.every=1", "checkpoint.keep_best=true"),
    "merges, new tokens, groups": (
        "lora_sft", "relora={every: 2, warmup_steps: 1, keep: 0.3}", "tokenizer.add_tokens=[red]", "lora.dropout=0.1",
        "optim.groups=[{match: lora_B, lr_scale: 3.0}]", "neftune=5"),
    "lengths of rows, a whole module, saved in the background": (
        "lora_sft", "lora.dora=true", "lora.modules_to_save=[embed_tokens]", "lora.lr_ratio=8", "optim.states=int8",
        "checkpoint.background=true", "eval.exact_match=2", "eval.max_new_tokens=3"),
    "several tokens ahead, moments of 4 bits, rounding by chance": (
        "pretrain", "mtp.depth=1", "optim.states=int4", "optim.rounding=stochastic", "dtype=bf16", "loss.z_loss=0.01",
        "context.ssmax=0.168"),
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A function: recipe, folder and words -> what seven steps with a checkpoint after every third leave behind."""
    folder = tmp_path_factory.mktemp("combined")
    model = write_model(folder / "model", num_hidden_layers=2)
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}!", "rejected": f"{i}?" * (1 + i % 2)} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"steps": 7, "checkpoint": {"every": 3, "keep": 9}, "schedule": {"warmup_steps": 2}}
    files = {}
    for rows, held_out in ((tiny.rows, tiny.held_out), (folder / "pairs.jsonl", folder / "pairs.jsonl")):
        (folder / rows.stem).mkdir()
        files[rows.stem] = write_config(folder / rows.stem / "c.yaml", model, rows, held_out, **settings)

    def start(recipe, out, *words):
        more = ("data.seq_len=128",) if recipe == "dpo" else ()
        file = files["pairs" if recipe == "dpo" else "train"]
        rows = train(recipe, "--config", file, *more, *words, f"output_dir={out}")
        rows = [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]
        samples = out / "samples.jsonl"
        said = samples.read_text() if samples.exists() else ""
        return rows, said, {str(file): file.read_bytes() for file in (out / "final").rglob("*") if file.is_file()}

    return start


@pytest.mark.parametrize("name", RUNS)
def test_going_on_is_the_run_that_was_never_stopped(name, start, tmp_path, capsys):
    recipe, *words = RUNS[name]
    whole = start(recipe, tmp_path, *words)
    undo(tmp_path, 4)
    assert start(recipe, tmp_path, *words) == whole
    at = max(int(line.split("_")[1][:6]) for line in capsys.readouterr().out.splitlines() if "resuming from" in line)
    assert at in (3, 4), "4 where the best evaluation was that"
