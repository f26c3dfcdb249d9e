"""A recipe is a script: called from Python, stopped by breakpoint(), changed in few lines, none of them in ftlib."""

# ruff: noqa: E501 - lines of recipes in one literal each
import dataclasses
import difflib
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_model import ROOT, command, steps, write_config

from ftlib import config, plugins
from ftlib.errors import UserError
from ftlib.sections import Batch, Data, Memory, Model, Optim, Source

RECIPE = (ROOT / "recipes" / "lora_sft.py").read_text()


def line(words: str) -> str:
    """The one line of the recipe that holds `words`."""
    (found,) = [text for text in RECIPE.splitlines(keepends=True) if words in text]
    return found


def lines(first: str, last: str) -> str:
    """The lines of the recipe from the one that holds `first` to the one that holds `last`."""
    start, end = line(first), line(last)
    return RECIPE[RECIPE.index(start) : RECIPE.index(end) + len(end)]


LOSS = lines("part = next_token_loss(", "part = (part + balance(micro)) / batch.target_weight")
MODEL, STEP = line("model = build.model("), line("grad_norm = optim.step(")
RATE, REPORT, LOADER = line("lr = optim.set_rate("), line("output.step("), line("loader = build.loader(")
BATCH, BACKWARD, SEED = line("batch = next(loader)"), line("part.backward()"), line("    seed: int")
IMPORT = line("import next_token_loss")
FOCAL = """                hidden, head = model(micro).flatten(0, 1), model.lm_head.weight
                logp = linear_logprobs(hidden, head, micro.labels.flatten(), **model.logit_terms)  # [B * T]
                part = -((1 - logp.detach().exp()) ** 2 * logp).sum() / batch.target_weight
"""

# name -> the pairs (what is there, what stands there after the edit).
EDITS = {
    "a new loss": [(IMPORT, IMPORT + "from ftlib.kernels.linear_logprobs import linear_logprobs\n"), (LOSS, FOCAL)],
    "label smoothing": [(LOSS, """                logits, labels = model.head(model(micro)).float().flatten(0, 1), micro.labels.flatten()
                smoothed = {"label_smoothing": 0.1, "reduction": "sum"}
                part = torch.nn.functional.cross_entropy(logits, labels, **smoothed) / batch.target_weight
""")],
    "an extra metric": [
        (BATCH, BATCH + "            right = torch.zeros((), device=run.device)\n"),
        (BACKWARD, BACKWARD + """                with torch.no_grad():
                    right += (model.head(model(micro)).argmax(-1) == micro.labels).sum()
"""),
        (REPORT, REPORT + """            output.evaluation(step, {"eval_right": run.total(right).item() / batch.target_weight}, [])
"""),
    ],
    "a freeze rule": [(MODEL, MODEL + """    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
""")],
    "an own sampler": [(LOADER, """    chosen = rows.train.lengths < 34  # short rows only
    loader = build.loader(cfg, rows.train.select(chosen), tokenizer, run)
""")],
    "a different schedule": [(RATE, """            lr = optim.set_rate(optimizer, cfg.optim.lr * min(1, step / 2, (steps - step + 1) / 3))  # up, flat, down
""")],
    "an extra evaluation": [(REPORT, REPORT + """            if step % 2 == 0:
                norm = sum(p.detach().square().sum() for p in model.parameters() if p.requires_grad).sqrt().item()
                output.evaluation(step, {"eval_adapter_norm": norm}, [])
""")],
    "a save hook": [(REPORT, REPORT + """            if step in (1, 3):
                result.save(model, cfg.output_dir / f"adapter_{step}", cfg.model.path, write=run.is_main)
""")],
    "gradient noise": [(STEP, """            for parameter in (p for p in model.parameters() if p.grad is not None):
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=cfg.noise)
""" + STEP), (SEED, "    noise: float = 0.1  # added to every gradient\n" + SEED)],
    "an own data format": [("@dataclass(frozen=True, kw_only=True)\nclass Config", """def pairs(row: dict) -> list[dict]:
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]


@dataclass(frozen=True, kw_only=True)
class Config""")],
}  # fmt: skip


def edited(name: str, file: Path) -> Path:
    """A copy of the recipe with one edit."""
    text = RECIPE
    for old, new in EDITS[name]:
        assert text.count(old) == 1, f"the recipe no longer has\n{old}"
        text = text.replace(old, new)
    file.write_text(text)
    return file


def run(file: Path, *argv: object) -> list[dict]:
    module = plugins.load_file(file)
    return module.main(config.load(module.Config, [str(word) for word in argv]))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The metrics of the recipe as it ships."""
    folder = tmp_path_factory.mktemp("plain")
    return run(
        ROOT / "recipes/lora_sft.py", "--config", write_config(folder / "c.yaml", tiny.model, tiny.rows, steps=4)
    )


@pytest.mark.parametrize("name", EDITS)
def test_ten_edits_of_at_most_ten_lines(name, tiny, tmp_path, plain):
    file = edited(name, tmp_path / "my.py")
    changed = [line for line in difflib.ndiff(RECIPE.splitlines(), file.read_text().splitlines()) if line[0] in "+-"]
    assert 0 < sum(line.startswith("+ ") for line in changed) <= 10
    rows, more = tiny.rows, []
    if name == "an own data format":
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(f'{{"q": "say {word}", "a": "{word}"}}\n' for word in ("red", "blue", "green") * 20))
        more = [f"data.sources[0].format={file}:pairs"]
    found = run(file, "--config", write_config(tmp_path / "c.yaml", tiny.model, rows, steps=4), *more)
    losses, usual = steps(found), steps(plain)
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    if name in ("a save hook", "an extra metric", "an extra evaluation"):
        assert losses == usual, "what only looks changes nothing"
    else:
        assert losses != usual
    extra = {"an extra metric": ("eval_right", 4), "an extra evaluation": ("eval_adapter_norm", 2)}.get(name)
    if extra:
        assert sum(extra[0] in row for row in found) == extra[1]
    if name == "a save hook":
        saved = sorted(p.name for p in (tmp_path / "out").glob("adapter_*"))
        assert saved == ["adapter_1", "adapter_3"]
    if name == "a different schedule":
        assert [row["lr"] for row in found if "lr" in row] == pytest.approx([5e-3, 1e-2, 20e-3 / 3, 1e-2 / 3])


def test_the_readme_has_the_loss_that_is_tested_here():
    assert textwrap.dedent(FOCAL) in (ROOT / "recipes" / "README.md").read_text()


def test_main_from_python_twice_in_one_process(tiny, tmp_path):
    recipe = plugins.load_file(ROOT / "recipes/lora_sft.py")
    cfg = recipe.Config(
        model=Model(path=str(tiny.model)),
        data=Data(sources=(Source(path=tiny.rows),), seq_len=64),  # a Path
        batch=Batch(rows=4, micro_rows=4),
        steps=3,
        optim=Optim(lr=1e-2),
        memory=Memory(recompute="none"),
        dtype="fp32",
        output_dir=tmp_path / "one",
    )
    first = recipe.main(cfg)
    second = recipe.main(dataclasses.replace(cfg, output_dir=tmp_path / "two"))
    assert steps(first) == steps(second) and len(steps(first)) == 3
    assert recipe.main(cfg) == first, "a finished run says so"
    assert torch.is_grad_enabled()
    with pytest.raises(UserError, match="s3:/bucket/run is an address"):
        recipe.main(dataclasses.replace(cfg, output_dir=Path("s3://bucket/run")))


def test_every_recipe_is_a_module(capsys):
    """Importing one runs nothing, and what a notebook needs is there."""
    before = torch.distributed.is_initialized()
    for path in sorted((ROOT / "recipes").glob("*.py")):
        module = plugins.load_file(path)
        assert callable(module.main) and dataclasses.is_dataclass(module.Config)
    assert (torch.distributed.is_initialized(), capsys.readouterr().out) == (before, "")


@pytest.mark.parametrize("processes", [1, 2])
def test_breakpoint_stops_rank_0_and_goes_on(processes, tiny, tmp_path):
    here = RECIPE.replace(REPORT, REPORT + "            if step == 1:\n                breakpoint()\n")
    (tmp_path / "my.py").write_text(here)
    file = write_config(tmp_path / "c.yaml", tiny.model, tiny.rows, steps=2, batch={"rows": 4, "micro_rows": 2})
    options = ["--nproc-per-node", processes] if processes > 1 else []
    with command("run", *options, "my.py", "--config", file, cwd=tmp_path, stdin=subprocess.PIPE) as process:
        out, err = process.communicate("p f'rank {run.rank} of {run.world} at {step}'\nc\n", timeout=120)
    assert process.returncode == 0, err
    assert out.count("(Pdb)") == 2, out
    assert f"'rank 0 of {processes} at 1'" in out
    assert "finished 2 steps" in out


def test_the_readme_from_python(tiny, tmp_path, monkeypatch):
    """Both blocks of recipes/README.md, as they stand there."""
    section = (ROOT / "recipes/README.md").read_text().split("## From Python or a notebook")[1].split("\n## ")[0]
    blocks, names = [part.split("```")[0] for part in section.split("```python\n")[1:]], {}
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    tiny.config(tmp_path, schedule={"name": "constant"}).rename("my.yaml")
    for block, steps_done in zip(blocks, (10, 2), strict=True):
        exec(block, names)
        assert names["rows"][-1]["step"] == steps_done
    assert Path("output/from_python/final/adapter_config.json").is_file()


def test_the_readme_s_config_of_a_distillation_is_one(tmp_path):
    text = (ROOT / "recipes/README.md").read_text().split("```yaml\n")[1].split("```")[0]
    recipe = plugins.load_file(ROOT / "recipes/distill.py")
    (file := tmp_path / "my.yaml").write_text(text)
    (tmp_path / "chats.jsonl").write_text("{}")
    assert config.load(recipe.Config, ["--config", str(file)]).distill.teacher == "Qwen/Qwen3-4B"
