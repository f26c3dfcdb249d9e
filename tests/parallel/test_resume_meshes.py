"""A run goes on where it was saved, on another mesh and another number of processes, with the same data and curve."""

import pytest
from parallel import spawn, training
from parallel.grid import GATHER, Case

LIMIT = 1e-6  # in float64: steps of Adam make more of rounding; another row or a lost moment is 1e-3 and more
# What is trained, and the meshes it is trained on one after the other: one step each on 2, 4 and 1 processes.
CHAINS = [
    ({"kind": "full"}, [{"shard": 2}, {"shard": 2, "tp": 2}, {}]),
    ({"kind": "full", "model": "mixtral"}, [{"tp": 2}, {"shard": 4}, {}]),
    ({"kind": "lora", "model": "wide", "quantize": "nf4"}, [{"tp": 2}, {"shard": 2, "tp": 2}, {}]),
    ({"kind": "lora", "model": "qwen3_moe"}, [{"replicate": 2}, {"cp": 2, "tp": 2, "style": GATHER}, {}]),
    ({"kind": "saved", "model": "qwen2"}, [{"cp": 2}, {"replicate": 2, "shard": 2}, {}]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    training.write_models(folder)
    return folder


@pytest.mark.parametrize("chains", [CHAINS[:3], pytest.param(CHAINS[3:], marks=pytest.mark.slow)], ids=["", "more"])
def test_every_leg_on_another_mesh_is_the_run_of_one_process(chains, models, tmp_path):
    """Last result of the slow ones (2026-11-22): passed."""
    for at, world in enumerate((2, 4, 1)):
        cases = [Case(**work, **meshes[at]) for work, meshes in chains]
        assert {case.world for case in cases} == {world}
        legs = [(str(tmp_path / f"chain_{i}"), at, at + 1) for i in range(len(chains))]
        for report in spawn.run(world, cases, models, tmp_path / f"world_{world}", legs=legs):
            for case, found in zip(cases, report, strict=True):
                assert "error" not in found, found["error"]
                assert all(value <= LIMIT for value in found.values()), (case, found)
