"""`tune merge --quantize` of a checkpoint: the model that merging the adapter of the same step gives, number by number.

Faults that were planted and went unseen: a checkpoint merged into the plain base all the same, and into the base first
and rounded after it.
"""

import pytest
from parity.shrink import relative
from safetensors.torch import load_file
from tiny_model import train, write_config, write_model, write_rows

from ftlib.cli import main as tune


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base, output) of a step on a base in NF4."""
    folder = tmp_path_factory.mktemp("run")
    base = write_model(folder / "model", "qwen2.5-7b", num_hidden_layers=1, intermediate_size=128)
    file = write_config(folder / "config.json", base, write_rows(folder / "rows.jsonl", 8), steps=1)
    words = ["model.quantize=nf4", "checkpoint={every: 1}", "schedule.name=constant", f"output_dir={folder / 'out'}"]
    train("lora_sft", "--config", file, *words)
    return base, folder / "out"


def test_a_checkpoint_and_its_adapter_are_merged_into_one_base(run, tmp_path):
    base, out = run
    found = {}
    for name in ("final", "checkpoints/step_000001"):
        for more in ([], ["--quantize", "nf4"]):
            merged = tmp_path / f"{len(found)}"
            assert tune(["merge", str(base), str(out / name), str(merged), *more]) == 0
            found[name, bool(more)] = load_file(merged / "model.safetensors")
    for rounded in (False, True):
        adapter, checkpoint = (found[name, rounded] for name in ("final", "checkpoints/step_000001"))
        assert adapter.keys() == checkpoint.keys()
        assert all(adapter[key].equal(checkpoint[key]) for key in adapter), rounded
    before, plain, rounded = load_file(base / "model.safetensors"), found["final", False], found["final", True]
    projections = [key for key in plain if key.endswith("_proj.weight")]
    assert len(projections) == 7
    for key in projections:
        assert 0.01 < relative(rounded[key], plain[key]) < 0.2 and not plain[key].equal(before[key]), key
