"""`tune generate` over a file of prompts, and how `generate` and `chat` sample: options over generation_config.json."""

import io
import json

import pytest
from tiny_model import write_model

from ftlib import cli, models, tokenizers
from ftlib.cli import chat, generate, sampling
from ftlib.errors import UserError
from ftlib.generation import Engine, SamplingParams
from ftlib.tokenizers import Tokenizer

OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [258, 65]}
ASKED = ["say red", "say blue", "what is it?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A model whose folder says how it is sampled."""
    folder = write_model(tmp_path_factory.mktemp("sampled"))
    (folder / "generation_config.json").write_text(json.dumps(OWN))
    return folder


def tune(capsys, *argv):
    code = cli.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": ASKED[0], "id": 7}, {"messages": [{"role": "user", "content": ASKED[1]}]}]
    answered = [{"role": "user", "content": ASKED[2]}, {"role": "assistant", "content": "left out"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*lines, {"messages": answered}]))
    return file


def test_a_file_of_prompts_is_answered_as_each_alone(model, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    code, said, err = tune(capsys, "generate", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 12)
    assert code == 0 and said == "" and "3 answers ->" in err, err
    rows = rows_of(out)
    assert [row["sample"] for row in rows] == [0, 0, 0] and rows[0]["id"] == 7 and "messages" in rows[1]
    for asked, row in zip(ASKED, rows, strict=True):
        alone = tune(capsys, "generate", model, "--prompt", asked, "--max-new-tokens", 12)[1]
        assert alone == row["answer"] + "\n" and row["finish_reason"] in ("stop", "length")
    shown = tune(capsys, "generate", model, "--prompts", prompts, "--max-new-tokens", 12)[1]
    assert [json.loads(line) for line in shown.splitlines()] == rows


def test_a_conversation_that_the_template_refuses_is_named(model, tmp_path, capsys, monkeypatch):
    file, render = tmp_path / "odd.jsonl", Tokenizer.apply_chat_template

    def refusing(self, messages, **options):
        if messages[0]["content"] == "odd":
            raise UserError("the chat template refuses this conversation", where="chat template, line 4")
        return render(self, messages, **options)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", refusing)
    file.write_text('{"prompt": "fine"}\n{"prompt": "odd"}\n')
    code, _, err = tune(capsys, "generate", model, "--prompts", file)
    assert code == 2 and "odd.jsonl:2, chat template, line 4" in err


def test_a_system_message_is_for_prompts_that_have_none():
    asked, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}
    given = {"role": "system", "content": "given"}
    assert generate._messages({"prompt": "hi"}, "given") == [given, asked]
    assert generate._messages({"messages": [asked]}, "given") == [given, asked]
    assert generate._messages({"messages": [own, asked]}, "given") == [own, asked]


def test_several_answers_are_drawn_as_the_engine_draws_them(model, prompts, tmp_path, capsys):
    out, how = tmp_path / "out.jsonl", {"temperature": 1.0, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 3}
    words = [word for key, value in how.items() for word in (f"--{key.replace('_', '-')}", value)]
    words += ["-n", 2, "--max-new-tokens", 9]
    assert tune(capsys, "generate", model, "--prompts", prompts, "--out", out, *words)[0] == 0
    rows, tokenizer = rows_of(out), tokenizers.from_pretrained(model)
    asked = [[{"role": "user", "content": text}] for text in ASKED]
    ids = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in asked]
    params = SamplingParams(9, stop_ids=tokenizer.stop_ids, **how)
    drawn = Engine(models.from_pretrained(model), compile="off").generate(ids, params, 2)
    wanted = [tokenizer.decode(one.token_ids, skip_special=True) for answers in drawn for one in answers]
    assert [row["answer"] for row in rows] == wanted and [row["sample"] for row in rows] == [0, 1] * 3
    assert len(set(wanted)) > 3
    shown = tune(capsys, "generate", model, "--prompt", ASKED[0], *words)[1]
    assert shown == f"{wanted[0]}\n---\n{wanted[1]}\n"


def test_an_answer_ends_before_a_stop_text(model, capsys):
    whole = tune(capsys, "generate", model, "--prompt", "say red", "--max-new-tokens", 24)[1][:-1]
    assert len(whole) > 8
    for stop in (whole[4], whole[3:6]):
        code, said, err = tune(capsys, "generate", model, "--prompt", "say red", "--max-new-tokens", 24, "--stop", stop)
        assert code == 0 and said == whole[: whole.find(stop)] + "\n" and "cut off" not in err


def test_stopped_requests_leave_the_engine(model):
    engine, tokenizer = Engine(models.from_pretrained(model), compile="off"), tokenizers.from_pretrained(model)
    steps, real = [], engine.step
    engine.step = lambda: (steps.append(1), real())
    first = sampling.draw(engine, tokenizer, [[5, 6]], SamplingParams(40, temperature=0))[0][0].text
    whole = len(steps)
    (ended,), _ = sampling.draw(
        engine, tokenizer, [[5, 6], [5, 6, 7]], SamplingParams(40, temperature=0), stops=[first[:1]]
    )
    assert ended.text == "" and ended.reason == "stop" and not engine.busy and len(steps) - whole <= whole


# ---------------------------------------------------------------- generation_config.json


def params(verb, folder, *argv):
    module, usual = {"generate": (generate, sampling.ANSWERING), "chat": (chat, sampling.TALKING)}[verb]
    asked = ["--prompt", "x"] if verb == "generate" else []
    args = module._parse([str(folder), *asked, *argv])
    return sampling.params(args, tokenizers.from_pretrained(folder), usual)


@pytest.mark.parametrize(("verb", "temperature"), [("generate", 0.0), ("chat", 0.7)])
def test_the_model_s_own_settings_stand_below_the_command_line(verb, temperature, model, sampled, capsys):
    plain = params(verb, model)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (temperature, 1.0, 0, 0.0)
    assert capsys.readouterr().err == ""
    own = params(verb, sampled)
    assert (own.temperature, own.top_p, own.top_k) == (0.6, 0.9, 20) and {258, 65} <= own.stop_ids
    said = capsys.readouterr().err
    assert said == "sampling as generation_config.json says: temperature=0.6, top_p=0.9, top_k=20\n"
    mine = params(verb, sampled, "--temperature", "0", "--top-k", "0", "--top-p", "1")
    assert (mine.temperature, mine.top_p, mine.top_k) == (0.0, 1.0, 0) and not capsys.readouterr().err


def test_settings_count_where_the_file_samples_as_in_transformers(tmp_path_factory, model):
    from transformers import GenerationConfig

    folder = write_model(tmp_path_factory.mktemp("greedy"))
    (folder / "generation_config.json").write_text(json.dumps(OWN | {"do_sample": False}))
    assert GenerationConfig.from_pretrained(folder).do_sample is False
    found = params("generate", folder)
    assert (found.temperature, found.top_p, found.top_k) == (0.0, 1.0, 0) and 65 in found.stop_ids
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": None}))
    assert params("generate", folder).temperature == 1.0


def test_chat_takes_them_too(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("say red\n"))
    code, whole, _ = tune(capsys, "chat", model, "--temperature", 0, "--max-new-tokens", 16)
    monkeypatch.setattr("sys.stdin", io.StringIO("say red\n"))
    words = ["--stop", whole[3], "--top-p", 0.5]
    code, said, err = tune(capsys, "chat", model, "--temperature", 0, "--max-new-tokens", 16, *words)
    assert code == 0 and said == whole[: whole.find(whole[3])] + "\n", err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x", "--prompts", "y.jsonl"], "not allowed with"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "rows.jsonl"], "rows.jsonl:2"),
        (["--prompt", "x", "--out", "y.jsonl"], "--out goes with --prompts"),
        (["--prompts", "rows.jsonl", "--out", "no/such/f.jsonl"], "lies in no folder"),
        (["--prompt", "x", "-n", "0"], "-n is at least 1"),
        (["--prompt", "x", "--top-p", "0"], "--top-p is above 0"),
        (["--prompt", "x", "--top-k", "-1"], "--top-k is at least 0"),
        (["--prompt", "x", "--min-p", "2"], "--min-p is from 0 to 1"),
        (["--prompt", "x", "--stop", ""], "--stop is a text"),
    ],
)
def test_mistakes_are_messages(words, said, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    code, _, err = tune(capsys, "generate", model, *words)
    assert code == 2 and said in err and "Traceback" not in err
