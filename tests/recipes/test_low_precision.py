"""Every mode of low precision trains near the plain run, not as it, and goes on from a checkpoint to the bit.

Faults that were planted, and the modes that saw them: a base in NF4 that resuming quantizes once more (nf4; for int8
and fp8 a second time changes nothing); trained weights that resuming rounds (full qat); rounding that counts the steps
of this start, or stays off (qat); noise by the count of calls (stochastic); moments left in float32 (int8, fp8, int4).
"""

import shutil

import pytest
from tiny_model import train, write_config, write_model, write_rows

from ftlib import quant
from ftlib.cli import main as tune
from ftlib.errors import UserError

EIGHT = "fp8: products of 14 layers of 14, a scale a "
FP8 = [(("model.fp8=tensorwise", "model.fp8_smallest=16"), EIGHT + "tensor"),
       (("model.fp8=rowwise", "model.fp8_smallest=16"), EIGHT + "row")]  # fmt: skip
QAT = [((f"qat.scheme={scheme}", "qat.after=1"), f"rounding: 14 layers of 14 to {scheme}, after step 1")
       for scheme in ("int4", "int8_int4", "fp8")]  # fmt: skip
MODES = [
    *(("lora", (f"model.quantize={form}",), f"base: 14 matrices in {form}") for form in ("nf4", "int8", "fp8")),
    ("lora", ("model.quantize=fp8", *FP8[0][0]), EIGHT + "tensor"),
    *((recipe, words, says) for recipe in ("lora", "full") for words, says in [*FP8, *QAT]),
    *(("full", (f"optim.states={states}",), "") for states in ("int8", "fp8", "int4")),
    ("full", ("dtype=bf16", "optim.rounding=stochastic"), ""),
    ("full", ("dtype=bf16", "optim.rounding=stochastic", "optim.states=int4", *FP8[0][0]), EIGHT + "tensor"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: recipe, folder and words -> what four steps with a checkpoint after two of them report."""
    folder = tmp_path_factory.mktemp("model")
    model = write_model(folder / "model", "qwen2.5-7b", num_hidden_layers=2, intermediate_size=128)
    rows, held_out = write_rows(folder / "rows.jsonl", 40), write_rows(folder / "held_out.jsonl", 4, seed=1)
    file = write_config(folder / "config.json", model, rows, held_out, steps=4, checkpoint={"every": 2})
    timed = "tokens_per_s", "data_wait"

    def run(recipe, out, *words):
        found = train(f"{recipe}_sft", "--config", file, *words, f"output_dir={out}")
        return [{key: value for key, value in row.items() if key not in timed} for row in found]

    run.model = model
    return run


def test_an_adapter_that_goes_on_with_another_base_is_told(run, tmp_path, capfd):
    run("lora", tmp_path / "a", "model.quantize=nf4")
    start = f"lora.start_from={tmp_path}/a/final"
    for number, (words, here) in enumerate({(): "plain", ("model.quantize=int8",): "kept in int8"}.items()):
        run("lora", tmp_path / str(number), start, *words)
        assert f"trained on a base kept in nf4, and goes on with one that is {here}" in capfd.readouterr().err
    run("lora", tmp_path / "same", start, "model.quantize=nf4")
    assert "goes on with" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """Losses of each recipe without any of the modes."""
    return {recipe: losses(run(recipe, tmp_path_factory.mktemp(recipe))) for recipe in ("lora", "full")}


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(("recipe", "words", "says"), MODES, ids=[" ".join((mode[0], *mode[1])) for mode in MODES])
def test_going_on_is_the_run_that_was_never_stopped(recipe, words, says, run, plain, tmp_path, capsys, monkeypatch):
    steps, at = [], quant.at
    monkeypatch.setattr(quant, "at", lambda step, model: (steps.append(step), at(step, model)))
    whole = run(recipe, tmp_path, *words)
    assert says in capsys.readouterr().out
    gaps = [abs(a - b) / b for a, b in zip(losses(whole), plain[recipe], strict=True)]
    assert 1e-6 < max(gaps) < 0.05
    final = contents(tmp_path / "final")
    shutil.rmtree(tmp_path / "checkpoints/step_000004")
    shutil.rmtree(tmp_path / "final")
    assert run(recipe, tmp_path, *words) == whole
    assert "resuming from step_000002" in capsys.readouterr().out
    assert steps == [1, 2, 3, 4, 3, 4], "each is told before it is taken"
    assert contents(tmp_path / "final") == final


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_a_checkpoint_is_merged_into_the_base_that_it_lacks(form, run, tmp_path, capsys):
    run("lora", tmp_path, f"model.quantize={form}", "steps=2")
    step = tmp_path / "checkpoints/step_000002"
    files = list(step.glob("*.safetensors"))
    assert files and not any(b".base." in file.read_bytes() for file in files), "it is made again at every start"
    words = ["merge", str(run.model), str(step)]
    capsys.readouterr()
    assert tune([*words, str(tmp_path / "merged"), "--quantize", form]) == 0
    assert "note:" not in capsys.readouterr().err
    assert tune([*words, str(tmp_path / "plainly")]) == 0
    assert f"--quantize {form}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "words", "key"),
    [
        ("lora", ["model.quantize=int8"], "model.quantize"), ("lora", FP8[0][0], "model.fp8"),
        ("full", ["qat.scheme=fp8"], "qat"), ("full", ["optim.states=int8"], "optim.states"),
    ],
    ids=str,
)  # fmt: skip
def test_changing_it_between_runs_is_refused(recipe, words, key, run, tmp_path):
    run(recipe, tmp_path, *words, "steps=2")
    with pytest.raises(UserError, match=key):
        run(recipe, tmp_path)
