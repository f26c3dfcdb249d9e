"""The recipes in this process: they learn, write what is promised, and others read their results."""

import json
import shutil

import pytest
import torch
from parity.shrink import relative
from tiny_model import TEMPLATE, losses, probe, steps, train, write_rows

from ftlib import cli, models, tokenizers
from ftlib.data import loader
from ftlib.errors import UserError
from ftlib.models.decoder import Decoder

RECIPES = ("lora_sft", "full_sft", "pretrain")
STEP_KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "peak_memory_gib", "data_wait"]


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tiny, tmp_path_factory):
    """(recipe, config file, output folder, rows) of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    file = tiny.config(folder, eval={"every": 8, "exact_match": 4, "max_new_tokens": 6, "prompts": ["say red"]})
    return request.param, file, folder / "out", train(request.param, "--config", file)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def theirs(run, tiny):
    """What transformers, with peft where it is an adapter, makes of `final/`."""
    recipe, _, out, _ = run
    if recipe != "lora_sft":
        return transformers_model(out / "final")
    from peft import PeftModel

    return PeftModel.from_pretrained(transformers_model(tiny.model), out / "final")


def test_loss_falls_and_rows_are_as_promised(run):
    _, _, out, rows = run
    assert rows == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [list(row) for row in trained] == [STEP_KEYS] * 20
    assert [row["step"] for row in trained] == list(range(1, 21))
    assert trained[-1]["loss"] < 0.6 * trained[0]["loss"]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] is None and row["peak_memory_gib"] is None for row in trained)
    assert 0 < trained[0]["tokens"] <= 4 * 64 and trained[-1]["tokens"] > trained[-2]["tokens"]
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [list(row) for row in evaluated] == [["step", "eval_loss", "exact_match"]] * 4
    assert [row["step"] for row in evaluated] == [0, 8, 16, 20]
    assert rows[0]["step"] == 0 and rows[-1] is evaluated[-1]
    assert evaluated[-1]["eval_loss"] < 0.6 * evaluated[0]["eval_loss"]
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "final", "checkpoints",
    }  # fmt: skip


def test_own_prompts_are_answered_at_every_evaluation(run):
    out = run[2]
    said = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in said] == [step for step in (0, 8, 16, 20) for _ in range(4)]
    own, held_out = said[::4], said[1::4] + said[2::4] + said[3::4]
    assert all(set(row) == {"step", "set", "prompt", "answer"} and row["set"] == "eval.prompts" for row in own)
    assert all(set(row) == {"step", "set", "prompt", "answer", "reference"} for row in held_out)
    assert all(row["prompt"] == "say red" for row in own) and {row["set"] for row in held_out} != {"eval.prompts"}
    assert run[0] == "pretrain" or own[0]["answer"] != own[-1]["answer"]
    assert "say red" in (out / "report.html").read_text()


def test_only_answers_to_something_are_compared(tiny, tmp_path):
    """A conversation that begins with its only answer is none, nor are texts; where there is no other, that is said."""
    first = {"messages": [{"role": "assistant", "content": "red"}]}
    rows = [first, *map(json.loads, tiny.held_out.read_text().splitlines()[:2])]
    held_out = tmp_path / "some.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, words = tiny.config(tmp_path, steps=1), ("eval.exact_match=2", "eval.max_new_tokens=2")
    run = lambda: train("full_sft", "--config", file, *words, f"data.eval=[{{path: '{held_out}'}}]")  # noqa: E731
    assert "exact_match" in run()[-1]
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert asked == [row["messages"][0]["content"] for row in rows[1:]] * 2
    held_out.write_text(json.dumps(first) + "\n" + json.dumps(first) + "\n")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="no held-out row is a conversation that ends with an answer"):
        run()


def test_others_load_the_result_with_equal_logits(run, tiny):
    recipe, _, out, _ = run
    reader = theirs(run, tiny).eval()
    if recipe == "lora_sft":
        from ftlib.adapters import peft_format

        ours = models.from_pretrained(tiny.model)
        peft_format.load(ours, out / "final")
    else:
        ours = models.from_pretrained(out / "final")
    mine = probe(ours.logits)
    assert relative(mine, probe(lambda ids: reader(ids).logits)) <= 1e-5
    start = models.from_pretrained(tiny.model)
    assert relative(mine, probe(start.logits)) > 0.01, "training must have changed the model"


def test_merge_is_what_transformers_loads(run, tiny, tmp_path, capsys):
    recipe, _, out, _ = run
    if recipe != "lora_sft":
        pytest.skip("only an adapter is merged")
    assert cli.main(["merge", str(tiny.model), str(out / "final"), str(tmp_path / "merged")]) == 0
    merged = transformers_model(tmp_path / "merged")
    reader = theirs(run, tiny).eval()
    assert relative(probe(lambda ids: merged(ids).logits), probe(lambda ids: reader(ids).logits)) <= 1e-5
    assert cli.main(["generate", str(tmp_path / "merged"), "--prompt", "say red", "--max-new-tokens", "4"]) == 0
    mine = capsys.readouterr().out.splitlines()[-1:]
    assert cli.main(["generate", str(out / "final"), "--prompt", "say red", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1:] == mine


def test_generate_equals_transformers(run, tiny, capsys):
    from transformers import AutoTokenizer

    _, _, out, _ = run
    assert cli.main(["generate", str(out / "final"), "--prompt", "say blue", "--max-new-tokens", "8"]) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert tokenizer.chat_template == TEMPLATE
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say blue"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = theirs(run, tiny).eval().generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=256)
    expected = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == expected


def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    recipe, file, out, _ = run
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    train(recipe, "--config", file)
    said, errors = capsys.readouterr()
    assert "finished run of 20 steps: nothing to do" in said and errors == ""
    after = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}
    assert after.keys() == before.keys()
    assert [path.name for path in before if after[path] != before[path]] == []


def test_raising_steps_continues(tiny, tmp_path, capsys):
    file = tiny.config(tmp_path, schedule={"name": "constant"}, steps=6)
    first = train("lora_sft", "--config", file)
    again = train("lora_sft", "--config", file, "steps=9")
    assert "resuming from step_000006" in capsys.readouterr().out
    assert losses(again)[:6] == losses(first) and len(losses(again)) == 9
    tiny.config(tmp_path, schedule={"name": "constant"}, steps=9, output_dir=str(tmp_path / "whole"))
    assert losses(train("lora_sft", "--config", file)) == losses(again)


def test_fewer_steps_than_were_done_are_refused(tiny, tmp_path):
    file = tiny.config(tmp_path, steps=3)
    train("lora_sft", "--config", file)
    with pytest.raises(UserError, match="has 3 steps, more than the 2 asked for"):
        train("lora_sft", "--config", file, "steps=2")
    assert [row["step"] for row in train("lora_sft", "--config", file)] == [0, 1, 2, 3, 3]


def test_accumulation_does_not_change_the_numbers(tiny, tmp_path):
    file = tiny.config(tmp_path, steps=8)
    runs = [
        train("full_sft", "--config", file, f"batch.micro_rows={n}", f"output_dir={tmp_path}/{n}") for n in (4, 2, 1)
    ]
    for other in runs[1:]:
        assert steps(other) == pytest.approx(steps(runs[0]), rel=2e-5)
        norms = [[row["grad_norm"] for row in rows if "loss" in row] for rows in (runs[0], other)]
        assert norms[1] == pytest.approx(norms[0], rel=2e-4)


def test_packing_does_not_change_the_loss_of_the_same_rows(tiny, tmp_path):
    """One step over a whole epoch: the mean over targets is the same however rows are laid out."""
    file = tiny.config(tmp_path, steps=1, batch={"rows": 96, "micro_rows": 96})
    packed = train("lora_sft", "--config", file, f"output_dir={tmp_path}/a")
    alone = train("lora_sft", "--config", file, "data.pack=false", f"output_dir={tmp_path}/b")
    assert steps(packed) == pytest.approx(steps(alone), rel=1e-5)
    assert packed[1]["tokens"] == alone[1]["tokens"]


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft"])
def test_short_rows_without_packing_learn_what_whole_ones_do(recipe, tiny, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (tiny.rows).read_text().splitlines()]
    for number, row in enumerate(rows):  # 40 to 240 tokens
        row["messages"][0]["content"] += " please" * (number % 30)
    data = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "seq_len": 512, "pack": False}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = {"rows": 4, "micro_rows": 2}
    file = tiny.config(tmp_path, data=data, batch=batch, steps=8, eval={"every": 4}, optim={"lr": 1e-3})
    widths = set()
    forward = Decoder.forward

    def watched(self, batch, *more):
        widths.add(batch.input_ids.shape[1])
        return forward(self, batch, *more)

    monkeypatch.setattr(Decoder, "forward", watched)
    short = train(recipe, "--config", file, f"output_dir={tmp_path}/short")
    assert widths <= {64, 128, 192, 256} and len(widths) > 2
    assert "of the positions that a step computes are padding" in capsys.readouterr().out
    monkeypatch.setattr(loader, "width", lambda longest, seq_len, multiple: seq_len)
    whole = train(recipe, "--config", file, f"output_dir={tmp_path}/whole")
    assert 512 in widths
    assert steps(short) == pytest.approx(steps(whole), rel=1e-4)
    assert [row["tokens"] for row in short if "loss" in row] == [row["tokens"] for row in whole if "loss" in row]
    for key in ("grad_norm", "eval_loss"):
        found = [[row[key] for row in run if key in row] for run in (short, whole)]
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_arguments_of_the_chat_template_are_trained_on_and_stay_with_the_result(tiny, tmp_path, capsys):
    (tmp_path / "brief.jinja").write_text("{{ 'Briefly. ' if brief }}" + TEMPLATE)
    data = {"sources": [{"path": str(tiny.rows)}], "seq_len": 96, "template": "brief.jinja"}
    file = tiny.config(tmp_path, data=data, steps=2, eval={"exact_match": 2, "max_new_tokens": 4})
    brief = "data.template_args={brief: true}"
    train("lora_sft", "--config", file, brief)
    with pytest.raises(UserError, match="data"):  # other rows than it was trained on
        train("lora_sft", "--config", file, "data.template_args.brief=false", "steps=3")
    assert cli.main(["preview", "lora_sft", "--config", str(file), brief, "--rows", "1"]) == 0
    assert "Briefly. <|im_start|>" in capsys.readouterr().out
    final = tmp_path / "out" / "final"
    tokenizer, ask = tokenizers.from_pretrained(final), [{"role": "user", "content": "say red"}]
    assert tokenizer.apply_chat_template(ask, tokenize=False).startswith("Briefly. ")
    assert not tokenizer.apply_chat_template(ask, tokenize=False, brief=False).startswith("Briefly. ")
    asked = ["generate", str(final), "--prompt", "say red", "--max-new-tokens", "4", "--template-arg"]
    assert cli.main([*asked, "brief=false"]) == 0
    for words, said in (("bref=1", "never reads 'bref' (did you mean 'brief'?)"), ("brief", "expected KEY=VALUE")):
        assert cli.main([*asked, words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["validate", "lora_sft", "--config", str(file), "data.template_args.bref=1"]) == 2
    assert "data.template_args.bref (command line)" in capsys.readouterr().err


def test_recompute_does_not_change_a_bit(tiny, tmp_path):
    file = tiny.config(tmp_path, steps=4, lora={"dropout": 0.2})
    runs = [
        train("lora_sft", "--config", file, f"memory.recompute={name}", f"output_dir={tmp_path}/{name}")
        for name in ("none", "full")
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_evaluating_does_not_change_training(tiny, tmp_path):
    """Dropout draws after each evaluation what it would have drawn without."""
    file = tiny.config(tmp_path, steps=5, lora={"dropout": 0.2}, eval={"every": 2, "exact_match": 2})
    often = train("lora_sft", "--config", file, f"output_dir={tmp_path}/often")
    off = ("eval.every=0", "eval.exact_match=0")
    never = train("lora_sft", "--config", file, f"output_dir={tmp_path}/never", "data.eval=null", *off)
    assert sum("eval_loss" in row for row in often) == 4 and not any("eval_loss" in row for row in never)
    assert losses(often) == losses(never)


def test_shuffled_answers_teach_nothing_about_held_out_rows(tiny, tmp_path):
    settings = {"steps": 60, "batch": {"rows": 4, "micro_rows": 4}, "eval": {"exact_match": 12, "max_new_tokens": 8}}
    file = tiny.config(tmp_path, **settings)
    nonsense = write_rows(tmp_path / "shuffled.jsonl", 96, shuffle_answers=True)
    real = train("full_sft", "--config", file, f"output_dir={tmp_path}/real")
    flat = train("full_sft", "--config", file, f"output_dir={tmp_path}/flat", f"data.sources[0].path={nonsense}")
    score = [rows[-1]["exact_match"] for rows in (real, flat)]
    assert real[0]["exact_match"] <= 0.2
    assert score[0] >= 0.8
    assert score[1] <= 0.4
