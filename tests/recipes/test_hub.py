"""Models by their Hub id, through the real command and a stand-in of the Hub on the loopback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_stand_in import COMMIT, hub
from tiny_model import ROOT, tune, write_config

# Several commands in one process: each would spend its time on imports.
DRIVER = """
import contextlib, io, json, sys
from ftlib import cli
for argv in json.loads(sys.argv[1]):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(argv)
    print(json.dumps([code, errors.getvalue()]))
"""


@pytest.fixture(scope="module")
def online(tiny, tmp_path_factory):
    served = tmp_path_factory.mktemp("served")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.model / name, served)
    (served / "modeling_evil.py").write_text("raise SystemExit('downloaded code ran')")
    with hub({"org/tiny": served, "org/closed": "GatedRepo"}) as (address, asked):
        yield address, asked


def environment(folder, address, **more):
    home = {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    return {**home, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def drive(commands, env):
    everything = {**os.environ, **env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, env=everything, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_and_what_follows_by_id(tiny, online, tmp_path):
    address, asked = online
    file = write_config(tmp_path / "config.yaml", "org/tiny@v1", tiny.rows, steps=2)
    env = environment(tmp_path, address)
    code, said, errors = tune("run", "recipes/lora_sft.py", "--config", file, cwd=tmp_path, env=env)
    assert code == 0, errors
    assert "results in" in said and "tune merge org/tiny@v1" in said
    assert f"GET /org/tiny/resolve/{COMMIT}/model.safetensors" in asked
    assert not [line for line in asked if "evil" in line], "code is not downloaded"
    final, count = str(tmp_path / "out" / "final"), len(asked)
    adapter = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())
    # The base as anyone can find it, not a folder of this machine's cache.
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", "v1")
    off = environment(tmp_path, address, HF_HUB_OFFLINE="1")
    merge = ["merge", "org/tiny@v1", final, str(tmp_path / "merged")]
    generate = ["generate", final, "--prompt", "say red", "--max-new-tokens", "2"]
    refused = ["generate", "org/never", "--prompt", "x"]
    results = drive([merge, generate, refused], off)
    assert [code for code, _ in results] == [0, 0, 2]
    assert results[2][1].startswith("error: org/never is not in the local cache and the Hub cannot be reached")
    assert len(asked) == count, "what is cached is not asked for again when offline"


def test_what_the_hub_does_not_give_is_one_message(tiny, online, tmp_path):
    address, _ = online
    file = write_config(tmp_path / "config.yaml", "org/tiny@v1", tiny.rows, steps=2)

    def validate(path):
        return ["validate", "recipes/lora_sft.py", "--config", str(file), f"model.path={path}"]

    ids = ("org/tiny@v1", "org/tiny@v2", "org/tinny", "org/closed")
    right, revision, missing, gated = drive([validate(name) for name in ids], environment(tmp_path, address))
    assert right == [0, ""]
    for code, message in (revision, missing, gated):
        assert code == 2
        assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message
    assert "org/tiny has no revision 'v2' on the Hub" in revision[1]
    assert "org/tinny: neither a folder here" in missing[1] and "HF_TOKEN" in missing[1]
    assert "org/closed is gated" in gated[1] and "accept its terms" in gated[1]


def test_a_hub_that_cannot_be_reached_is_one_message(tiny, tmp_path):
    nowhere = environment(tmp_path, "http://127.0.0.1:9")
    [[code, message]] = drive([["generate", "org/tiny", "--prompt", "x"]], nowhere)
    assert code == 2
    assert message.startswith("error: ") and "org/tiny" in message and "Traceback" not in message
