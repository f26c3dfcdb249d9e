"""The server against the engine itself: many clients at once, streams, stops, refusals."""

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY

import pytest
from tiny_model import command

from ftlib import models, tokenizers
from ftlib.cli import serve
from ftlib.errors import UserError
from ftlib.generation import Engine, SamplingParams
from ftlib.models import hub
from ftlib.serving import requests
from ftlib.serving.server import Server
from ftlib.serving.service import Service
from ftlib.serving.text import GrowingText

MODEL, CLIENTS = "ftlib:demo/model", 64


class Busiest(Engine):
    """An engine that remembers how many requests ran at once."""

    most = 0

    def _advance(self):
        self.most = max(self.most, len(self.live))
        super()._advance()


@pytest.fixture(scope="module")
def served():
    model, tokenizer = models.from_pretrained(MODEL), tokenizers.from_pretrained(hub.resolve(MODEL))
    engine = Busiest(model, max_batch=CLIENTS, max_tokens=16_384)
    service = Service(engine)
    server = Server(("127.0.0.1", 0), service, tokenizer, "demo", context=400)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()
    service.close()


def ask(server, path, body=None, headers=None):
    """The JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(server.url + path, data, headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def stream(server, path, body):
    """The objects of a stream, up to [DONE]."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert reply.headers["Content-Type"] == "text/event-stream"
        lines = [line.decode() for line in reply]
    events = [line.removeprefix("data: ").strip() for line in lines if line.strip()]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def refused(server, path, body, **options):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, path, body, **options)
    return caught.value.code, json.load(caught.value)["error"]


def talk(number):
    return [{"role": "user", "content": f"Order: Eva, {number} books and 30 pens"}]


def test_many_streaming_clients_share_the_batch_and_get_what_they_would_get_alone(served):
    asked = {"model": "demo", "max_tokens": 24, "temperature": 0.9, "logprobs": True}

    def client(number):
        body = {**asked, "messages": talk(number), "seed": number, "stream_options": {"include_usage": True}}
        return stream(served, "/v1/chat/completions", body)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, range(CLIENTS)))
    assert served.service.engine.most > CLIENTS // 2
    alone, tokenizer = Engine(served.service.engine.model), served.tokenizer
    for number in (0, 17, 63):
        prompt = tokenizer.apply_chat_template(talk(number), add_generation_prompt=True)
        params = SamplingParams(24, temperature=0.9, seed=number, stop_ids=tokenizer.stop_ids)
        [[expected]] = alone.generate([prompt], params)
        first, *chunks, usage = answers[number]
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert said == tokenizer.decode(expected.token_ids, skip_special=True)
        found = [p["logprob"] for c in chunks for p in c["choices"][0]["logprobs"]["content"]]
        assert found == pytest.approx(expected.logprobs, abs=1e-4)
        assert chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason
        assert usage["usage"]["completion_tokens"] == len(expected.token_ids) and usage["choices"] == []
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({answer[0]["id"] for answer in answers}) == CLIENTS
    assert not served.service.engine.busy


def test_the_openai_package_streams_to_as_many_clients(served):
    """Its own client, a connection each: streams, whole answers, completions of texts, errors by its own names."""
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    served.service.engine.most = 0

    def client(number):
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
            events = one.chat.completions.create(
                model="demo", messages=talk(number), max_tokens=24, temperature=0.9, seed=number, stream=True
            )
            return "".join(event.choices[0].delta.content or "" for event in events)

    with ThreadPoolExecutor(CLIENTS) as pool:
        said = list(pool.map(client, range(CLIENTS)))
    assert served.service.engine.most > CLIENTS // 2 and not served.service.engine.busy
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        asked = {"model": "demo", "max_tokens": 24, "temperature": 0.9}
        for number in (0, 17, 63):
            whole = one.chat.completions.create(**asked, messages=talk(number), seed=number)
            assert whole.choices[0].message.content == said[number] and whole.usage.completion_tokens > 0
        assert one.completions.create(**asked, prompt="Order: Eva").choices[0].finish_reason in ("stop", "length")
        assert [model.id for model in one.models.list()] == ["demo"]
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            one.chat.completions.create(model="demo", messages=talk(0), max_tokens=-1)


def test_texts_and_token_ids_in_whole_answers(served):
    text, tokenizer = "Order: Eva, 14 books", served.tokenizer
    ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None)
    body = {"max_tokens": 8, "temperature": 0, "n": 2, "logprobs": 0}
    one = ask(served, "/v1/completions", {**body, "prompt": text})
    two = ask(served, "/v1/completions", {**body, "prompt": [ids, ids]})
    assert one["object"] == "text_completion" and [c["index"] for c in two["choices"]] == [0, 1, 2, 3]
    assert {c["text"] for c in one["choices"]} == {c["text"] for c in two["choices"]}
    assert "".join(one["choices"][0]["logprobs"]["tokens"]).startswith(one["choices"][0]["text"])
    drawn = sum(len(c["logprobs"]["token_logprobs"]) for c in one["choices"])
    assert one["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn,
    }  # fmt: skip
    pieces = stream(served, "/v1/completions", {**body, "prompt": text, "n": 1})
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == one["choices"][0]["text"]
    chat = ask(served, "/v1/chat/completions", {"messages": talk(3), "temperature": 0})
    assert chat["choices"][0]["message"]["content"] and chat["choices"][0]["finish_reason"] in ("stop", "length")


def test_an_answer_ends_before_a_stop_text(served):
    body = {"messages": talk(3), "temperature": 0, "max_tokens": 40}
    whole = ask(served, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    stop = whole[4:7]
    cut = whole[: whole.index(stop)]
    found = ask(served, "/v1/chat/completions", {**body, "stop": ["never said", stop]})["choices"][0]
    assert found["message"]["content"] == cut and found["finish_reason"] == "stop"
    pieces = stream(served, "/v1/chat/completions", {**body, "stop": stop})
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == cut
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_a_request_leaves_out_is_as_the_models_folder_says(monkeypatch):
    tokenizer = tokenizers.from_pretrained(hub.resolve(MODEL))

    def sampled(**more):
        params = requests.read({"prompt": "a", **more}, False, tokenizer, "demo", 400).params
        return params.temperature, params.top_p, params.top_k, params.min_p

    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    monkeypatch.setattr(tokenizer.files, "generation", {})
    assert sampled() == (1.0, 1.0, 0, 0.0)
    monkeypatch.setattr(tokenizer.files, "generation", own)
    assert sampled() == (0.6, 0.95, 20, 0.0) and sampled(temperature=0, top_k=-1, min_p=0.1) == (0.0, 0.95, 0, 0.1)
    monkeypatch.setattr(tokenizer.files, "generation", own | {"do_sample": False})
    assert sampled() == (1.0, 1.0, 0, 0.0)


def test_models_and_health(served):
    assert ask(served, "/health") == {"status": "ok"}
    assert [model["id"] for model in ask(served, "/v1/models")["data"]] == ["demo"]
    assert ask(served, "/v1/models/demo")["object"] == "model"


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": []}, "messages", "list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "no text"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "no room"),
        ({"max_tokens": 4000}, "max_tokens", "leaves room for"),
        ({"temperature": -1}, "temperature", "from 0 to 10"),
        ({"temperature": float("nan")}, "temperature", "from 0 to 10"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": True}, "n", "an integer"),
        ({"n": 1000}, "n", "from 1 to 128"),
        ({"stop": [1]}, "stop", "a text"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"logprobs": 3}, "logprobs", "true or false"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(served, change, param, says):
    code, error = refused(served, "/v1/chat/completions", {"messages": talk(1), **change})
    assert code == 400 and error["param"] == param and says in error["message"], error


def test_wrong_paths_models_keys_and_bodies(served):
    body = {"messages": talk(1), "max_tokens": 1}
    assert refused(served, "/v1/chat/completions", {**body, "model": "gpt-4"})[0] == 404
    assert refused(served, "/v1/embeddings", body)[0] == 404
    assert refused(served, "/v1/chat/completions", body, headers={"Content-Type": "text/plain"})[0] == 415
    assert refused(served, "/v1/chat/completions", None) == (405, ANY)  # a GET
    assert refused(served, "/v1/chat/completions", [1])[1]["message"] == "the body is no JSON object"
    assert refused(served, "/v1/completions", {"prompt": ""})[1]["param"] == "prompt"
    assert refused(served, "/v1/completions", {"prompt": [99_999]})[1]["param"] == "prompt"
    served.api_key = "secret"
    try:
        assert refused(served, "/v1/chat/completions", body)[0] == 401
        assert ask(served, "/v1/chat/completions", body, headers={"Authorization": "Bearer secret"})["choices"]
    finally:
        served.api_key = None


def test_a_client_that_leaves_frees_its_place_and_an_engine_that_fails_says_so(served):
    engine, body = served.service.engine, {"messages": talk(1), "max_tokens": 300, "stream": True, "temperature": 2}
    request = urllib.request.Request(
        served.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply = urllib.request.urlopen(request, timeout=60)
    reply.readline()
    reply.close()
    assert ask(served, "/v1/chat/completions", {**body, "stream": False, "max_tokens": 2})["choices"]
    left = served.service.submit([[5, 6]], SamplingParams(300, temperature=2), 2)
    next(iter(left))
    left.close()
    deadline = time.monotonic() + 30
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy and all(request.finish_reason is None for request in left.requests)
    assert len(engine.pool.free) == engine.pool.pages
    usual, engine._advance = engine._advance, lambda: 1 / 0
    try:
        code, error = refused(served, "/v1/chat/completions", {**body, "stream": False})
    finally:
        engine._advance = usual
    assert code == 500 and "ZeroDivisionError" in error["message"]
    assert ask(served, "/v1/chat/completions", {**body, "stream": False, "max_tokens": 2})["choices"]


def test_text_grows_by_whole_characters_and_holds_back_what_may_be_a_stop(served):
    tokenizer, said = served.tokenizer, "naïve – 東京 🙂 ends</stop>never"
    ids = tokenizer.encode(said)
    growing = GrowingText(tokenizer, ("</stop>", "🙂🙂"))
    pieces = [growing.push(token) for token in ids]
    assert growing.stopped and "".join(pieces) + growing.finish() == "naïve – 東京 🙂 ends"
    assert not any("\ufffd" in piece or "<" in piece for piece in pieces)
    growing = GrowingText(tokenizer, ("</stop>",))
    assert "".join(growing.push(token) for token in tokenizer.encode("a </sto")) + growing.finish() == "a </sto"


def test_other_machines_need_a_key():
    with pytest.raises(UserError, match="whoever reaches"):
        serve.main([MODEL, "--host", "0.0.0.0"])


def test_the_command_serves_and_ends_when_told():
    process = command("serve", MODEL, "--port", "0", "--context", "64", "--max-batch", "4")
    try:
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http")).rstrip(";")
        request = urllib.request.Request(
            f"{url}/completions", b'{"prompt": "Order:", "max_tokens": 3}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] <= 3
    finally:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, errors
