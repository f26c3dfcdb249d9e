"""The tiny model, its rows and a config, made once for all tests of a worker."""

from types import SimpleNamespace

import pytest
from tiny_model import write_config, write_model, write_rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`.model`, `.rows`, `.held_out` and `.config(folder, **sections)`."""
    folder = tmp_path_factory.mktemp("tiny")
    made = SimpleNamespace(
        model=write_model(folder / "model"),
        rows=write_rows(folder / "train.jsonl", 96),
        held_out=write_rows(folder / "held_out.jsonl", 12, seed=1),
    )

    def config(where, **sections):
        return write_config(where / "config.yaml", made.model, made.rows, made.held_out, **sections)

    made.config = config
    return made
