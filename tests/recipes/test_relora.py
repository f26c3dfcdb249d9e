"""Runs that merge adapters while they train: ranks, checkpoints, results, processes, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity.shrink import relative
from safetensors.torch import load_file
from tiny_model import ROOT, losses, probe, steps, train, tune, write_config, write_model

from ftlib import build, cli, config, models, plugins, preflight
from ftlib.errors import UserError
from ftlib.evaluation import metrics
from ftlib.observe import output, watch

SETTINGS = {
    "schedule": {"name": "cosine", "warmup_steps": 1, "min_ratio": 0.5},
    "checkpoint": {"every": 1, "keep": 9},
    "optim": {"lr": 1e-2},
    "lora": {"rank": 2},
    "relora": {"every": 3, "warmup_steps": 1},
    "steps": 8,
}


@pytest.fixture(scope="module")
def lab(tiny, tmp_path_factory):
    """`.run(name, *words)`: the rows of a run of eight steps, merged after the third and the sixth, in `.at / name`."""
    at = tmp_path_factory.mktemp("relora")
    file = tiny.config(at, **SETTINGS)
    run = lambda name, *words: train("lora_sft", "--config", file, f"output_dir={at / name}", *words)  # noqa: E731
    return SimpleNamespace(at=at, file=file, run=run, rows=run("whole"), whole=at / "whole", base=tiny.model)


def test_the_sum_of_adapters_has_a_rank_that_none_has(lab):
    """Three adapters of rank 2: the weights of `final/` have moved in six directions."""
    before, after = models.from_pretrained(lab.base), models.from_pretrained(lab.whole / "final")
    lab.run("plain", "relora.every=0")
    assert cli.main(["merge", str(lab.base), str(lab.at / "plain" / "final"), str(lab.at / "merged")]) == 0
    plain = models.from_pretrained(lab.at / "merged")
    matrices = [name for name, p in before.named_parameters() if ".layers." in name and p.ndim == 2]
    for name in matrices:
        ranks = []
        for model in (after, plain):
            moved = model.get_parameter(name) - before.get_parameter(name)
            values = torch.linalg.svdvals(moved.detach())
            ranks.append(int((values > 1e-3 * values[0]).sum()))
        assert ranks == [6, 2], (name, ranks)


def test_the_result_is_a_whole_model(lab):
    """Whose logits are those of the last state: others load it, and a checkpoint of the run merges into the same."""
    from transformers import AutoModelForCausalLM

    final = lab.whole / "final"
    assert (final / "config.json").is_file() and not (final / "adapter_config.json").exists()
    ours = probe(models.from_pretrained(final).logits)
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    assert relative(ours, probe(lambda ids: theirs(ids).logits)) <= 1e-5
    again = train("lora_sft", "--config", lab.file, f"output_dir={lab.at / 'look'}", f"model.path={final}", "steps=5")
    assert again[0]["eval_loss"] == pytest.approx(lab.rows[-1]["eval_loss"], rel=1e-5)
    checkpoint = lab.whole / "checkpoints" / "step_000008"
    assert cli.main(["merge", str(lab.base), str(checkpoint), str(lab.at / "from_checkpoint")]) == 0
    written = [load_file(folder / "model.safetensors") for folder in (final, lab.at / "from_checkpoint")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_a_checkpoint_has_the_base_once_it_has_changed(lab):
    held = {}
    for folder in (lab.whole / "checkpoints").iterdir():
        names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
        held[folder.name] = "model.model.layers.0.mlp.up_proj.weight" in names
        assert "model.model.embed_tokens.weight" not in names, "only what adapters were merged into"
    assert held == {f"step_{step:06}": step > 3 for step in range(1, 9)}


def cut(lab, name, step):
    """A copy of the whole run's folder, as if it had been killed after `step`."""
    out = shutil.copytree(lab.whole, lab.at / name)
    shutil.rmtree(out / "final")
    (out / ".finished.json").unlink()
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return out


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_resumed_to_the_bit(step, lab):
    """Inside the first period, where a merge is due, right after one, where the second is due."""
    out = cut(lab, f"cut{step}", step)
    again = lab.run(out.name)
    assert losses(again) == losses(lab.rows) and again[-1]["eval_loss"] == lab.rows[-1]["eval_loss"]
    files = [(folder / "final" / "model.safetensors").read_bytes() for folder in (lab.whole, out)]
    assert files[0] == files[1]


def test_off_is_what_it_was_and_on_changes_what_follows_a_merge(lab):
    off, on = losses(lab.run("plain", "relora.every=0")), losses(lab.rows)
    assert off[:3] == on[:3] and all(a != b for a, b in zip(off[4:], on[4:], strict=True))
    assert steps(lab.rows)[-1] < 0.9 * steps(lab.rows)[0] and lab.rows[-1]["eval_loss"] < lab.rows[0]["eval_loss"]


def test_moments_that_wait_or_move_elsewhere_are_pruned_alike(lab):
    """In host memory, in backward: the same bits; kept in 16 bits: nearly the same steps."""
    plain, *others = (
        lab.run(name, "optim.max_grad_norm=null", *words)
        for name, words in {
            "unclipped": (), "away": ("optim.offload=true",), "early": ("optim.in_backward=true",),
            "half": ("optim.states=bf16",),
        }.items()
    )  # fmt: skip
    assert losses(others[0]) == losses(others[1]) == losses(plain)
    assert steps(others[2]) == pytest.approx(steps(plain), rel=1e-2) and losses(others[2]) != losses(plain)


@pytest.mark.parametrize("best", [2, 5])
def test_the_best_evaluation_is_what_is_kept(best, lab, monkeypatch):
    """Of a step before the first merge, whose base is in no checkpoint, and of one after it."""
    scored = output.Output.evaluation

    def better(self, step, row, samples):
        scored(self, step, {"judge": float(step == best), **row}, samples)

    monkeypatch.setattr(output.Output, "evaluation", better)
    monkeypatch.setattr(metrics, "names", lambda cfg: ["judge"])
    words = ("checkpoint.keep_best=true", "checkpoint.keep=1", "eval.every=1", "eval.metric=judge")
    rows = lab.run(f"best{best}", *words)
    monkeypatch.undo()
    assert losses(rows) == losses(lab.rows)
    final = lab.at / f"best{best}" / "final"
    again = lab.run(f"look{best}", f"model.path={final}", "relora.every=0", "steps=1")
    (wanted,) = [row["eval_loss"] for row in rows if row["step"] == best and "eval_loss" in row]
    assert again[0]["eval_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_going_back_over_a_merge_with_new_rows(tied, lab, monkeypatch):
    """A loss spike in the step after the first merge sends the run to the checkpoint before it, which has no base; rows
    of new tokens, which grew embedding and head, go along. What follows is merged again, and kept."""
    model = write_model(lab.at / f"tied_{tied}", tie_word_embeddings=tied)
    watched = watch.Watch.__call__
    monkeypatch.setattr(watch.Watch, "__call__", lambda self, step, *a: watched(self, step, *a) or step == 4)
    new = 'tokenizer.add_tokens=["<x>", "<y>"]'
    out = lab.at / f"back_{tied}"
    rows = lab.run(out.name, f"model.path={model}", new, "eval.every=1")
    monkeypatch.undo()
    scores = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert scores[4] == scores[3] and len({scores[step] for step in range(4, 9)}) == 5
    look = train("lora_sft", "--config", lab.file, f"output_dir={out}_look", f"model.path={out / 'final'}", "steps=5")
    assert look[0]["eval_loss"] == pytest.approx(scores[8], rel=1e-5)
    checkpoint = out / "checkpoints" / "step_000008"
    assert cli.main(["merge", str(model), str(checkpoint), f"{out}_merged"]) == 0
    written = [load_file(folder / "model.safetensors") for folder in (out / "final", Path(f"{out}_merged"))]
    assert written[0].keys() == written[1].keys() and len(written[0]["model.embed_tokens.weight"]) >= 261
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_an_adapter_that_is_continued_is_merged_too(lab):
    adapter = lab.at / "plain" / "final"
    lab.run("plain", "relora.every=0")
    rows = lab.run("continued", f"lora={{start_from: {adapter}}}", "optim.lr=1e-9")
    assert rows[-1]["eval_loss"] == pytest.approx(rows[0]["eval_loss"], rel=1e-5), "nothing is lost in two merges"
    assert rows[0]["eval_loss"] != lab.rows[0]["eval_loss"]


@pytest.mark.slow
def test_two_processes_merge_what_one_merges_and_go_on_to_the_bit(lab):
    """Base, adapters and moments in shards (FSDP2), and a norm that trains whole beside them. Half of the moments stay:
    of 1 % nobody would see which. Last result (2026-11-23): passed."""
    more = ("lora.modules_to_save=[norm]", "relora.keep=0.5")
    words = ("--config", lab.file, *more, "parallel.dp_shard=2", "batch.micro_rows=2")
    command = ("run", "--nproc-per-node", 2, ROOT / "recipes" / "lora_sft.py", *words)
    code, _, errors = tune(*command, f"output_dir={lab.at / 'two'}")
    assert code == 0, errors
    whole = rows_of(lab.at / "two")
    assert steps(whole) == pytest.approx(steps(lab.run("norm", *more)), rel=1e-5)
    out = cut(SimpleNamespace(whole=lab.at / "two", at=lab.at), "two_cut", 4)
    code, said, errors = tune(*command, f"output_dir={out}")
    assert code == 0 and "resuming from step_000004" in said, errors
    assert losses(rows_of(out)) == losses(whole)
    files = [(folder / "final" / "model.safetensors").read_bytes() for folder in (lab.at / "two", out)]
    assert files[0] == files[1]
    alone = cut(SimpleNamespace(whole=lab.at / "two", at=lab.at), "two_alone", 4)
    assert steps(lab.run(alone.name, *more)) == pytest.approx(steps(whole), rel=1e-5), "shards read by one process"
    one, two = (load_file(lab.at / name / "final" / "model.safetensors") for name in ("norm", "two"))
    assert one.keys() == two.keys()
    assert all(relative(two[key], one[key]) < 1e-4 for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-3.2-1b", ["parallel.tp=2"]),
        ("gpt-oss-20b", ["parallel.dp_shard=2", "batch.micro_rows=2"]),
        ("gpt-oss-20b", ["parallel.tp=2"]),
        ("llama-3.2-1b", ["parallel.dp_replicate=2", "batch.micro_rows=2"]),
        ("llama-3.2-1b", ["parallel.dp_shard=2", "batch.micro_rows=2", 'tokenizer.add_tokens=["<x>"]']),
        ("llama-3.2-1b", ["parallel.dp_shard=2", "batch.micro_rows=2", "optim.offload=true", "memory.compile=true"]),
    ],
    ids=str,
)
def test_on_every_kind_of_shard(name, words, tiny, tmp_path):
    """Last result (2026-11-22): passed."""
    model = write_model(tmp_path / "model", name, **({"intermediate_size": 64} if "gpt" in name else {}))
    file = write_config(tmp_path / "c.yaml", model, tiny.rows, **SETTINGS | {"checkpoint": {"every": 0}})
    more = [word for word in words if word.startswith("tokenizer")]
    one = train("lora_sft", "--config", file, f"output_dir={tmp_path / 'one'}", *more)
    run = ("run", "--nproc-per-node", 2, ROOT / "recipes" / "lora_sft.py", "--config", file)
    code, _, errors = tune(*run, f"output_dir={tmp_path / 'two'}", *words)
    assert code == 0, errors
    assert steps(rows_of(tmp_path / "two")) == pytest.approx(steps(one), rel=1e-5)
    written = [load_file(tmp_path / which / "final" / "model.safetensors") for which in ("one", "two")]
    assert written[0].keys() == written[1].keys()
    assert all(relative(written[1][key], written[0][key]) < 1e-3 for key in written[0])


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.quantize=int8"], r"rounded anew.*relora\.every, model\.quantize"),
        (["optim.name=muon"], "AdamW's moments"),
        (["optim.states=int8"], "in 16 bits at least"),
        (["lora.dora=true"], r"lora\.dora: the length"),
        (["lora.init=pissa"], "pissa begins inside W"),
        (["lora.targets=[lm_head,q_proj]"], "would never train"),
        (["steps=3"], "nothing is merged in 3 steps"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_what_it_does_not_go_with_is_refused(lab, words, named):
    recipe = plugins.load_file(ROOT / "recipes" / "lora_sft.py")
    cfg = config.load(recipe.Config, ["--config", str(lab.file), *words])
    with pytest.raises(UserError, match=f"(?s){named}"):
        build.check(cfg)


def test_a_run_goes_on_with_the_merges_it_began_with(lab):
    for words, named in ((["relora.every=4"], "relora.every: 3 then, 4 now"), (["relora.keep=0"], "relora.keep")):
        with pytest.raises(UserError, match=named):
            lab.run("whole", "steps=10", *words)


def test_the_plan_counts_the_base_on_disk(lab):
    recipe, least = plugins.load_file(ROOT / "recipes" / "lora_sft.py"), {}
    for every in (0, 3):
        cfg = config.load(recipe.Config, ["--config", str(lab.file), f"relora.every={every}"])
        least[every] = preflight.need(build.check_model(cfg), cfg, 1)
    written = (lab.whole / "final" / "model.safetensors").stat().st_size
    assert least[3].final == pytest.approx(written, rel=0.05) and least[0].final < 0.5 * written
    held = sum(file.stat().st_size for file in (lab.whole / "checkpoints" / "step_000008").glob("*.safetensors"))
    assert least[3].checkpoint == pytest.approx(held, rel=0.1) and least[3].memory == least[0].memory
    matrices = [tensor for name, tensor in load_file(lab.base / "model.safetensors").items() if ".layers." in name]
    assert least[3].moments["merge"]["merged"] == 12 * max(tensor.numel() for tensor in matrices) > least[0].merged == 0
