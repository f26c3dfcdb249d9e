"""Results appear whole or not at all."""

import os
from pathlib import Path

import pytest
from faults.tiny_training import one_process

from ftlib.checkpoint import final_folder, publish, staging


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    final = tmp_path / "final"
    folder = staging(final)
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("1")
    publish(folder, final)
    assert (final / "sub" / "a").read_text() == "1"

    (staging(final) / "a").write_text("2")  # killed here, and begun again
    folder = staging(final)
    assert list(folder.iterdir()) == []
    (folder / "a").write_text("3")
    rename = os.rename

    def fail(source, target):
        if Path(target) == final and Path(source) == folder:
            raise OSError("no")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "rename", fail)
        publish(folder, final)
    assert (final / "sub" / "a").read_text() == "1", "the old result is back"
    publish(folder, final)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (final / "a").read_text() == "3"
    with pytest.raises(ValueError, match="not the staging folder"):
        publish(tmp_path, final)


def test_final_folder(tmp_path):
    with pytest.raises(RuntimeError, match="half"), final_folder(one_process(), tmp_path) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("half")
    assert not (tmp_path / "final").exists()
    with final_folder(one_process(), tmp_path) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
