"""What a launcher's environment variables say, set by a launcher or by accident."""

import pytest

from ftlib import world
from ftlib.checkpoint import changes
from ftlib.errors import UserError

ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def setting(monkeypatch, **variables):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_alone_and_launched(monkeypatch):
    setting(monkeypatch)
    world.check()
    assert (world.world_size(), world.rank()) == (1, 0)
    setting(monkeypatch, WORLD_SIZE="4", RANK="3", **ADDRESS)
    world.check()
    assert (world.world_size(), world.rank()) == (4, 3)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", **ADDRESS}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "5", **ADDRESS}, "RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "abc"}, "MASTER_PORT"),
    ],
)
def test_variables_that_no_launcher_set_are_named(variables, named, monkeypatch):
    setting(monkeypatch, **variables)
    with pytest.raises(UserError, match="unset them") as caught:
        world.check()
    assert named in caught.value.where


def test_nodes_with_other_configs_are_told_apart_by_their_keys():
    one = {"seed": 0, "optim": {"lr": 1e-3}, "batch": {"micro_rows": 1}, "model": {"path": "/a"}, "output_dir": "/b"}
    assert changes.apart([one, one | {"model": {"path": "/c"}, "output_dir": "/d"}]) == []
    other = one | {"seed": 7, "optim": {"lr": 5e-4}, "batch": {"micro_rows": 2}}
    assert changes.apart([one, one, other]) == [
        "seed: 0 in process 0, 7 in process 2",
        "optim.lr: 0.001 in process 0, 0.0005 in process 2",
        "batch.micro_rows: 1 in process 0, 2 in process 2",
    ]
