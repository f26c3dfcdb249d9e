"""Run the grid and write its table into README.md beside this file: `python table.py [--short]`."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from parallel import spawn, training  # noqa: E402
from parallel.grid import SHORT, wide  # noqa: E402

KINDS = ("loss", "grad", "norm", "weight")


def main(cases):
    lines = [
        "# Every mesh against one process",
        "",
        "Largest relative difference from the same two AdamW steps on one process: loss, every gradient, gradient",
        "norm, weights after the last step. Limits: 1e-10 in float64, 1e-5 in float32.",
        f"torch {torch.__version__}, gloo on CPU.",
        "Written by `python tests/parallel/table.py`.",
        "",
        "| mesh | what is trained | " + " | ".join(KINDS) + " |",
        "|---|---|" + "---|" * len(KINDS),
    ]
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        training.write_models(models)
        for world in sorted({case.world for case in cases}):
            mine = [case for case in cases if case.world == world]
            reports = spawn.run(world, mine, models, Path(folder) / str(world), timeout=3600)
            for case, found in zip(mine, zip(*reports, strict=True), strict=True):
                assert not any("error" in one for one in found), found
                numbers = [max(one[kind] for one in found) for kind in KINDS]
                lines.append(f"| {case.mesh} | {case.work} | " + " | ".join(f"{n:.0e}" for n in numbers) + " |")
    (Path(__file__).parent / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(SHORT if "--short" in sys.argv else wide())
