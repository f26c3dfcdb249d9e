"""`tune download` and `tune push` against a Hub on the loopback: what is checked first, what is sent, what is told."""

import json
from pathlib import Path

import pytest
from unit.small_hub import hub

from ftlib import cli
from ftlib.models import remote

FILES = {
    "config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(300_000), "tokenizer.json": b"{}",
    "modeling_evil.py": b"boom", "consolidated.safetensors": bytes(9), "onnx/config.json": b"{}",
}  # fmt: skip


@pytest.fixture
def online(tmp_path, monkeypatch):
    """The Hub, an empty cache and an empty working directory."""
    from huggingface_hub import constants, file_download

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    remote.cached.cache_clear()
    with hub({"org/tiny": dict(FILES), "org/closed": dict(FILES)}, gated=("org/closed",)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
    remote.cached.cache_clear()


def test_downloads_weights_config_and_tokenizer_only(online, tmp_path, capsys):
    assert cli.main(["download", "org/tiny", "here", "--revision", "v1"]) == 0, capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "here").iterdir() if p.is_file()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "org/tiny@v1: 293 KiB in " in capsys.readouterr().out
    assert any("/resolve/" in path for _, path, _ in online.asked)


def test_a_broken_download_goes_on_where_it_stopped(online, tmp_path, capsys):
    online.break_after = 100_000
    first = cli.main(["download", "org/tiny", "here"])
    if first:  # the client gives up after a few tries of its own
        assert "run the same command again" in capsys.readouterr().err
    online.break_after = None
    assert cli.main(["download", "org/tiny", "here"]) == 0
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [found for _, path, found in online.asked if path.endswith("model.safetensors") and found]
    assert ranges and all(text.startswith(("bytes=100000-", "bytes=200000-")) for text in ranges), ranges


MISTAKES = {
    "no such repository": (["org/tinny"], "org/tinny: neither a folder here", "check the spelling"),
    "no such revision": (["org/tiny@v9"], "org/tiny has no revision 'v9'"),
    "gated": (["org/closed"], "org/closed is gated on the Hub", "accept its terms"),
    "two revisions": (["org/tiny@v1", "--revision", "main"], "two revisions"),
    "no id": (["tiny"], "tiny: is no Hub id"),
    "into a file": (["org/tiny", "file"], "file is a file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_is_fetched(online, tmp_path, name, capsys):
    (tmp_path / "file").touch()
    argv, *expected = MISTAKES[name]
    assert cli.main(["download", *argv]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in expected), told
    assert not [path for verb, path, _ in online.asked if "/resolve/" in path]


def test_no_room_is_told_before_anything_is_fetched(online, capsys):
    online.sizes["model.safetensors"] = 1 << 60
    assert cli.main(["download", "org/tiny"]) == 2
    told = capsys.readouterr().err
    assert "no room for org/tiny" in told and "HF_HOME" in told
    assert not [path for verb, path, _ in online.asked if "/resolve/" in path]


def test_a_wrong_token_is_told(online, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert cli.main(["download", "org/tiny"]) == 2
    assert "the token is wrong" in capsys.readouterr().err


def test_offline_and_not_cached(online, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["download", "org/tiny"]) == 2
    told = capsys.readouterr().err
    assert "not in the local cache and the Hub cannot be reached" in told
    assert f"{Path.cwd() / 'org/tiny'} is none" in told  # a path that is spelt wrong looks like an id


def test_what_is_cached_works_without_the_hub(online, monkeypatch, capsys):
    assert cli.main(["download", "org/tiny"]) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert (remote.fetch("org/tiny") / "model.safetensors").stat().st_size == 300_000


@pytest.fixture
def adapter(tmp_path):
    """What a run leaves, its base a path of this machine."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "secret")}))
    (final / "adapter_model.safetensors").write_bytes(b"weights")
    (final / "tokenizer.json").write_text("{}")
    (final / "notes.txt").write_text("private")
    data = f"data: {{sources: [{{path: {tmp_path}/rows.jsonl}}]}}"
    config = f"model: {{path: {tmp_path}/secret}}\n{data}\noptim: {{lr: 1e-3}}\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    rows = [{"step": 0, "eval_loss": 3.0}, {"step": 9, "eval_loss": 1.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return final


def test_push_sends_the_adapter_with_a_card_and_nothing_of_this_machine(online, adapter, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert cli.main(["push", str(adapter), "org/new", "--base", "org/tiny", "--private"]) == 0, capsys.readouterr().err
    assert sorted(online.uploaded) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert online.created[0].get("private") is True or online.created[0].get("visibility") == "private"
    assert json.loads(online.uploaded["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    card = online.uploaded["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\n") and "base_model: org/tiny" in card
    assert "| eval_loss | 3.0000 | 1.5000 |" in card and "rows.jsonl" in card
    everything = b"".join(online.uploaded.values()).decode()
    assert "secret" not in everything and str(adapter.parent) not in everything


PUSH_MISTAKES = {
    "no base": ([], "base model is a folder of this machine", "--base org/name"),
    "no token": (["--base", "org/tiny"], "uploading needs a token"),
    "no id": (["--base", "a/b", "--revision"], "expected one argument"),
}


@pytest.mark.parametrize("name", PUSH_MISTAKES)
def test_push_mistakes(online, adapter, name, capsys):
    argv, *expected = PUSH_MISTAKES[name]
    assert cli.main(["push", str(adapter), "org/new", *argv]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in expected), told
    assert not online.uploaded


def test_push_of_what_is_no_model(online, adapter, capsys):
    assert cli.main(["push", str(adapter.parent), "org/new"]) == 2
    assert "neither an adapter nor a model" in (told := capsys.readouterr().err) and str(adapter) in told
    assert cli.main(["push", str(adapter), "new"]) == 2
    assert "new: is no Hub id" in capsys.readouterr().err


def test_dry_run_uploads_nothing(online, adapter, capsys):
    assert cli.main(["push", str(adapter), "org/new", "--base", "org/tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "adapter_model.safetensors  7 B" in out and "# new" in out and "notes.txt" not in out
    assert not online.asked
