"""A stored teacher's tokens go with their rows, however a step is cut into micro-batches."""

import pytest
from tiny_model import steps, train, write_model


def test_each_micro_batch_reads_what_was_stored_for_its_rows(tiny, tmp_path):
    student = write_model(tmp_path / "student", num_hidden_layers=1, hidden_size=32)
    told = {"teacher": str(tiny.model), "stored": str(tmp_path / "store"), "top_k": 260, "divergence": "reverse_kl"}
    file = tiny.config(tmp_path, distill=told, steps=3, optim={"lr": 1e-2})
    runs = [
        train("distill", "--config", file, f"model.path={student}", f"batch.micro_rows={size}", f"output_dir={out}")
        for size, out in ((4, tmp_path / "four"), (1, tmp_path / "one"))
    ]
    assert steps(runs[0]) == pytest.approx(steps(runs[1]), rel=1e-4)
