"""`tune merge` stores what it merges in the precision of the files it read, whatever config.json says of them."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_model

from ftlib import cli, models
from ftlib.adapters import lora, peft_format

DEMO = "ftlib:demo/model"
SMALL = [
    "data.sources=[{path: ftlib:demo/data/lora_train.jsonl}]", "data.eval=8", "data.seq_len=128", "steps=2",
    "dtype=fp32", "batch={rows: 2, micro_rows: 2}", "eval.exact_match=0", f"model.path={DEMO}",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a model in float32 whose config.json says bfloat16, an adapter for it that changes nothing)."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model", torch_dtype="bfloat16", dtype=None)
    model = models.from_pretrained(folder / "model")
    lora.attach(model, "all-linear", rank=2, alpha=2.0)
    lora.reset(model, 0)
    peft_format.save(model, folder / "adapter", base=str(folder / "model"))
    return folder / "model", folder / "adapter"


def test_float32_files_stay_float32(base, tmp_path, capsys):
    model, adapter = base
    assert json.loads((model / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert cli.main(["merge", str(model), str(adapter), str(tmp_path / "out")]) == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert all(found[key].dtype == torch.float32 and found[key].equal(wanted[key]) for key in wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "rounded" not in capsys.readouterr().err


def test_a_few_numbers_that_are_rounded_are_told(base, tmp_path, capsys):
    model, adapter = base
    tensors = {key: t if "norm" in key else t.bfloat16() for key, t in load_file(model / "model.safetensors").items()}
    few = sum(t.numel() for key, t in tensors.items() if "norm" in key)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in model.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["merge", str(mixed), str(adapter), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert f"note: {few:,} numbers of {mixed} are float32 and are rounded to bfloat16" in capsys.readouterr().err


def test_what_a_float32_run_rounded_is_merged_to_the_bit(tmp_path, capsys):
    """Training with `qat` and the commands it proposes report one loss, on a base in bfloat16: `tune merge` without a
    loss of precision, recipes/quantize.py on the run's data."""
    run, merged, rounded = tmp_path / "run", tmp_path / "merged", tmp_path / "run" / "rounded"
    lora_sft = ["run", "recipes/lora_sft.py", *SMALL, "optim.lr=0.02", "qat.scheme=int4"]
    assert cli.main([*lora_sft, f"output_dir={run}"]) == 0
    said = [line.split("] ")[-1].strip() for line in capsys.readouterr().out.split("next:")[1].splitlines()]
    merge, quantize = (shlex.split(line)[1:] for line in said if line.startswith(("tune merge", "tune run recipes/q")))
    assert "--quantize" not in merge
    for adapter in ("final", "checkpoints/step_000002"):
        assert cli.main(["merge", DEMO, str(run / adapter), str(merged), "--quantize", "nf4"]) == 2
        assert "trained on the plain base, not on one kept in nf4" in capsys.readouterr().err and not merged.exists()
    assert cli.main([word.replace("MERGED", str(merged)) for word in merge]) == 0
    assert "against rounding" not in capsys.readouterr().err
    for adapter in ("final", "checkpoints/step_000002"):  # without --dtype fp32
        assert cli.main(["merge", DEMO, str(run / adapter), str(tmp_path / adapter[:5])]) == 0
        said = f"note: {run / adapter} was trained against rounding (qat) in float32, and the sum is stored in bfloat16"
        assert said in capsys.readouterr().err
    words = [word.replace("MERGED", str(merged)) for word in (*quantize, "eval.exact_match=0")]
    assert cli.main(words) == 0
    assert cli.main([*words, "to.scheme=fp8"]) == 2
    assert f"{rounded}/final exists and stays as it is" in capsys.readouterr().err
    last = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (run, rounded)]
    assert last[0]["eval_loss"] == last[1]["eval_loss"]
    with pytest.warns(UserWarning, match="model.path is kept in compressed-tensors: what is rounded"):
        again = [f"model.path={rounded}/final", f"output_dir={tmp_path}/again"]
        assert cli.main(["validate", "recipes/quantize.py", *words[2:], *again]) == 0
    with pytest.warns(UserWarning, match="compressed-tensors already: model.quantize=nf4 rounds"):
        lora_sft = ["validate", "recipes/lora_sft.py", *SMALL, f"model.path={rounded}/final"]
        assert cli.main([*lora_sft, "model.quantize=nf4", f"output_dir={tmp_path}/twice"]) == 0


def test_the_command_proposed_after_a_quantized_run_names_its_base(tmp_path, capsys):
    words = ["run", "recipes/lora_sft.py", *SMALL, "steps=1", "data.eval=null", "model.quantize=nf4"]
    assert cli.main([*words, f"output_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out.split("next:")[1]
    assert f"tune merge {DEMO} {tmp_path / 'run'}/final MERGED --quantize nf4" in said
    final, plain = tmp_path / "run" / "final", "was trained on a base kept in nf4, and lies on the plain one here"
    assert cli.main(["merge", DEMO, str(final), str(tmp_path / "plain")]) == 0
    said = f"note: {final} {plain}: another model than was evaluated; --quantize nf4 merges it into that base"
    assert said in capsys.readouterr().err
