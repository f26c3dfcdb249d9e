"""What the READMEs say exists, and what they show works as it is written."""

import re
import shlex

import pytest
from tiny_model import ROOT

from ftlib import config, plugins
from ftlib.cli import VERBS, assets

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    re.sub(r"\s+#.*", "", line)
    for language, block in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("tune ")
]
FOLDERS = [path for path in ROOT.rglob("README.md") if not {".venv", "output", "node_modules"} & set(path.parts)]


def test_short_and_with_one_marked_test_command():
    assert len(TEXT.splitlines()) <= 250
    [command] = re.findall(r"<!-- ci:test -->\n```sh\n(.*)\n```", TEXT)
    assert command == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


@pytest.mark.parametrize("file", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
        assert (file.parent / target).exists(), target


def test_verbs_recipes_and_configs_exist():
    named = set(re.findall(r"(?:^|`|bin/)tune ([a-z]+)", TEXT, re.MULTILINE))
    assert named - {"VERB"} <= set(VERBS)
    for name in re.findall(r"(?:recipes|configs)/\w+\.(?:py|yaml)", TEXT):
        assert (ROOT / name).exists(), name


def test_the_config_that_is_shown_is_one(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    module = plugins.load_file(ROOT / "recipes" / "lora_sft.py")
    (tmp_path / "shown.yaml").write_text(text)
    assert config.load(module.Config, ["--config", str(tmp_path / "shown.yaml")]).steps == 300


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in ("run", "validate")])
def test_runs_that_are_shown_name_keys_that_exist(command):
    words = shlex.split(command)[2:]
    module = plugins.load_file(assets.resolve_recipe("lora_sft"))
    overrides = [word for word in words if "=" in word]
    base = ["model.path=ftlib:demo/model", "data.sources=[{path: ftlib:demo/data/lora_train.jsonl}]"]
    assert config.load(module.Config, [*base, *overrides]).model.path
