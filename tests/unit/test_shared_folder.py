"""What is written can be read by whom the user lets read their files."""

import os

import pytest

from ftlib import models
from ftlib.adapters import lora, peft_format


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_are_as_open_as_other_files(tmp_path, mask):
    model, before = models.from_pretrained("ftlib:demo/model"), os.umask(mask)
    try:
        models.save_pretrained(model, tmp_path / "model")
        lora.attach(model, "all-linear", rank=2)
        lora.reset(model, 0)
        peft_format.save(model, tmp_path / "adapter", base="demo")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert sum(path.suffix == ".safetensors" for path in files) == 2
