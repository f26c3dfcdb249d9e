"""Docs cannot lag: every `tune …` line and every key in a README or a shipped YAML is one that exists."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from tiny_model import ROOT

from ftlib import cli, config, data, plugins, tokenizers
from ftlib.cli import assets, completion
from ftlib.config.types import known_keys
from ftlib.data import prompts
from ftlib.data.formats import choose_shape, kind
from ftlib.models import hub
from ftlib.sections import Data, Source
from ftlib.sections.rl import Prompts

READMES = sorted(path for path in ROOT.rglob("README.md") if ".git" not in path.parts and "output" not in path.parts)
IN_CODE = re.compile(r"`(tune [^`]+)`|^\s*(?:\$ )?(tune .+)$", re.MULTILINE)
RECIPES = {path.stem: path for path in assets.shipped("recipes").values()}


def keys_of(recipe):
    return known_keys(plugins.load_file(RECIPES[recipe]).Config)


@pytest.fixture(scope="module")
def every_key():
    return {key for recipe in RECIPES for key in keys_of(recipe)}


def commands(text):
    """Every command line that a text shows, in backquotes or on a line of its own."""
    for match in IN_CODE.finditer(text):
        line = (match[1] or match[2]).split("  ")[0].split(" #")[0].replace("\\", " ")
        yield re.sub(r"\s+", " ", line).strip()


def texts():
    found = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
    for verb in cli.VERBS:
        found[f"help of {verb}"] = cli.module(verb).__doc__ or ""
    for path in RECIPES.values():
        found[f"recipes/{path.name}"] = path.read_text().split('"""')[1]
    return found


TEXTS = texts()


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_of_the_docs_exists(name, every_key):
    for line in commands(TEXTS[name]):
        try:
            words = shlex.split(line)[1:]
        except ValueError:
            pytest.fail(f"{name}: {line}")
        if not words or words[0] in ("VERB", "…") or words[0].startswith("-"):
            continue
        verb, *rest = words
        assert verb in cli.VERBS, f"{name}: {line}"
        known = completion._options(verb)
        for word in rest:
            if word.startswith("--") and verb not in ("run", "validate") and known:
                assert word.split("=")[0] in [*known, "--help"], f"{name}: {line}: {word}"
            if re.fullmatch(r"(recipes|configs)/[\w/]+\.(py|yaml)", word):
                assert (ROOT / word).is_file(), f"{name}: {line}: {word}"
            key = re.match(r"~?([a-z_]+(?:[.\[][\w.\[\]]+)*)=", word)
            if key and verb in completion.WITH_RECIPE and "key" not in key[1]:
                assert re.sub(r"\[\d+\]", "[]", key[1]) in every_key, f"{name}: {line}: {key[1]}"


def test_every_dotted_key_of_the_readmes_exists(every_key):
    sections = {key.split(".")[0] for key in every_key if "." in key}
    for name, text in TEXTS.items():
        text = text.split("<!-- made by")[0]  # tables of other libraries' keys
        for key in re.findall(r"`([a-z_]+\.[a-z_.\[\]]+)(?:[=:][^`]*)?`", text):
            if key.split(".")[0] in sections and not re.search(r"\.(py|json|jsonl|yaml|md)$", key):
                assert key.replace("[0]", "[]") in every_key, f"{name}: `{key}`"


@pytest.mark.parametrize("name", assets.shipped("configs"))
def test_every_shipped_config_parses_for_its_recipe(name):
    path = assets.shipped("configs")[name]
    recipe = re.search(r"schema/(\w+)\.json", path.read_text())
    assert recipe, f"{name} does not name its schema"
    config.load(plugins.load_file(RECIPES[recipe[1]]).Config, ["--config", str(path)])


def test_the_overview_names_verbs_that_work(capsys):
    for verb in cli.VERBS:
        assert cli.module(verb).main.__doc__.startswith("`tune "), verb


def test_the_speed_table_is_what_was_measured():
    command = [sys.executable, "tools/bench/table.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "README.md").read_text()


GOES_WITH = {"model.quantize": "lora", "log.statistics": "stream"}  # a key that all have -> what it needs in the config


def test_the_table_of_switches_is_that_of_the_configs():
    text = TEXTS["recipes/README.md"]
    head, _, *rows = text.split("## Which recipe has which switch\n\n")[1].split("\n\n")[0].splitlines()
    recipes = re.findall(r"`(\w+)`", head)
    assert {*recipes, "quantize"} == set(RECIPES)
    told = {line.split("`")[1]: [cell.strip() == "x" for cell in line.split("|")[3:-1]] for line in rows}
    assert told == {key: [GOES_WITH.get(key, key) in keys_of(recipe) for recipe in recipes] for key in told}
    shared = set.intersection(*(set(keys_of(recipe)) for recipe in recipes))
    named = {key.split(".")[0] for key in told} | set(re.findall(r"`(\w+)`", text))
    for recipe in ("lora_sft", "full_sft", "pretrain"):
        sections = {key.split(".")[0] for key in keys_of(recipe) if "." in key}
        assert sections - shared <= named, "every section that only some have is in it"


ROW = re.compile(r"^\| (.+?) \| `(\{\".+?\})`[^|]*\|$", re.MULTILINE)
LOADS = {"train": "train", "preference": "pairs", "unpaired": "rated", "stepwise": "steps"}  # kind of rows -> Wanted


@pytest.mark.parametrize(("folder", "count"), [("data", 11), ("preference", 4), ("rl", 2)])
def test_every_row_of_the_readmes_loads(folder, count, tmp_path):
    tokenizer = tokenizers.from_pretrained(hub.resolve("ftlib:demo/model"))
    rows = ROW.findall(TEXTS[f"ftlib/{folder}/README.md"])
    assert len(rows) == count
    for name, text in rows:
        (tmp_path / "rows.jsonl").write_text(f"{text}\n{text}\n")
        source = Source(path=str(tmp_path / "rows.jsonl"))
        if folder == "rl" or name == "`prompt`":
            found = prompts.load(Prompts(sources=(source,), seq_len=256), tokenizer, 8, seed=0)
            assert found.columns == {"answer"} and len(found.train.sources[0]) == 2, text
            continue
        shape = choose_shape(json.loads(text), "auto", {}, {}, "data.sources[0]", ("assistant",))
        assert folder != "data" or name == f"`{shape.format}`", "the format that is told by the columns"
        wanted = data.Wanted(LOADS[kind(shape.format)])
        found = data.load(Data(sources=(source,), seq_len=256), tokenizer, seed=0, wanted=wanted)
        assert len(found.train) == 2 and not any("dropped" in line for line in found.report.lines()), text


def test_tables_of_losses_and_algorithms_are_up_to_date():
    tool = plugins.load_file(ROOT / "tools/method_tables.py")
    for file, text in tool.texts().items():
        assert file.read_text() == text, f"{file} is out of date: python tools/method_tables.py"
