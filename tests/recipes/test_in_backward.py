"""Recipes whose parameters move in backward, or whose moments wait in host memory, take the same steps."""

import pytest
from tiny_model import losses, train, write_config


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_the_same_steps_as_after_backward(recipe, tiny, tmp_path):
    found = []
    for early, away in ((False, False), (True, False), (True, True)):
        folder = tmp_path / f"{early} {away}"
        folder.mkdir()
        optim = {"lr": 1e-2, "max_grad_norm": None, "in_backward": early, "offload": away}
        schedule = {"warmup_steps": 2}  # so that a rate that comes too late is another one
        file = write_config(folder / "c.yaml", tiny.model, tiny.rows, steps=20, optim=optim, schedule=schedule)
        found.append(train(recipe, "--config", file, "steps=6"))
    assert losses(found[0]) == losses(found[1]) == losses(found[2])
    for row, other in zip(*found[:2], strict=True):
        if "grad_norm" in row:
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5) and other["lr"] == row["lr"]
