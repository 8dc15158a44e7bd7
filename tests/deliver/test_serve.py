"""The OpenAI-style server on the tiny model: what it answers, whom it refuses, and that requests do not mix."""

import asyncio
import io
import json
import re
import threading
import time

import pytest
import torch
from rich.console import Console

# ruff: noqa: E402 -- skipped without the server libraries
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from starlette.requests import Request
from starlette.testclient import TestClient

from tunesmith.deliver import answer
from tunesmith.deliver.answer import Writer, Written
from tunesmith.deliver.web import access
from tunesmith.deliver.web import serve as serving
from tunesmith.deliver.web.api import create_api
from tunesmith.deliver.web.app import BODY_LIMIT, PAGES, json_body
from tunesmith.errors import ConfigError
from tunesmith.evaluate.generate import encode_prompt, generate_texts

HERE = "http://127.0.0.1:8000"
HELLO = [{"role": "user", "content": "hello"}]
SHORT = {"max_new_tokens": 12}


@pytest.fixture
def writer(tiny_model, byte_tokenizer):
    tiny_model.generation_config.eos_token_id = None
    return Writer(tiny_model, byte_tokenizer, SHORT)


@pytest.fixture
def client(writer):
    with TestClient(create_api(writer, name="tiny"), base_url=HERE) as client:
        yield client


def ask(client, messages=HELLO, **options):
    return client.post("/v1/chat/completions", json={"messages": messages, **options})


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response):
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def streamed_text(response):
    deltas = [event["choices"][0]["delta"] for event in events_of(response) if event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def canned(monkeypatch, *pieces):
    """A model that writes these pieces."""

    def write(self, asked, say, stopped):
        for piece in pieces:
            say(piece)
        return Written(len(pieces), "stop")

    monkeypatch.setattr(Writer, "write", write)


# ---------------------------------------------------------------------------------------------------- answers


def test_a_client_that_leaves_amid_its_body_is_no_failure_of_the_server():
    async def receive():
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    with pytest.raises(access.Refused, match="The client left before its body was whole"):
        asyncio.run(json_body(request))


# workflow: W8
def test_an_answer_is_what_generation_gives_for_the_same_messages(client, tiny_model, byte_tokenizer):
    prompt = encode_prompt(byte_tokenizer, HELLO).input_ids
    expected = dict(generate_texts(tiny_model, byte_tokenizer, [prompt], decoding=SHORT))[0]
    reply = ask(client).json()
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12
    }  # fmt: skip


# workflow: W8
def test_a_stream_holds_the_same_answer_and_ends_with_its_counts(client):
    response = ask(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert streamed_text(response) == text_of(ask(client))


def test_the_models_and_the_model_by_its_name_are_told(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/gpt-4").status_code == 404
    assert ask(client, model="tiny").status_code == 200
    assert "serves 'tiny', not 'gpt-4'" in ask(client, model="gpt-4").json()["error"]["message"]


def test_a_seed_repeats_a_sampled_answer_and_without_a_temperature_nothing_is_sampled(client):
    one, again, other = (ask(client, temperature=2.0, seed=seed) for seed in (3, 3, 4))
    assert text_of(one) == text_of(again) != text_of(other)
    assert text_of(ask(client)) == text_of(ask(client, temperature=1e-9)) == text_of(ask(client, top_p=1, seed=8))


def test_the_template_s_variables_hold_unless_a_request_brings_its_own(tiny_model, byte_tokenizer):
    template = "{{ mood | default('none') }}: {{ messages[-1].content }}"
    writer = Writer(tiny_model, byte_tokenizer, chat_template=template, chat_template_kwargs={"mood": "calm"})
    asked = [{"role": "user", "content": "a"}]
    assert byte_tokenizer.decode(writer.encode(asked)) == "calm: a"
    assert byte_tokenizer.decode(writer.encode(asked, chat_template_kwargs={"mood": "glad"})) == "glad: a"


def test_a_stop_text_ends_the_answer_even_where_it_lies_across_tokens(client, monkeypatch):
    whole = text_of(ask(client))
    stop = whole[4:6]
    assert text_of(ask(client, stop=stop)) == whole[: whole.index(stop)]
    reply = ask(client, stop=[stop, "never"]).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < 12
    assert text_of(ask(client, stop="never written")) == whole


def test_the_stop_token_ends_an_answer_and_is_not_part_of_it(client, writer, tiny_model):
    ids = torch.tensor([writer.encode(HELLO)])
    writer.stop_ids = [int(tiny_model(ids).logits[0, -1].argmax())]
    reply = ask(client).json()
    assert reply["choices"][0]["message"]["content"] == ""
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("stop", 1)


def test_max_tokens_has_both_its_names(client):
    for name in ("max_tokens", "max_completion_tokens"):
        assert ask(client, **{name: 3}).json()["usage"]["completion_tokens"] == 3


def test_a_system_message_of_the_server_opens_conversations_that_have_none(tiny_model, byte_tokenizer):
    app = create_api(Writer(tiny_model, byte_tokenizer, SHORT), name="tiny", system="Be kind.")
    with TestClient(app, base_url=HERE) as client:
        own = [{"role": "system", "content": "Be kind."}, *HELLO]
        assert ask(client).json()["usage"] == ask(client, own).json()["usage"]
        assert client.get("/settings").json() == {"model": "tiny", "system": "Be kind.", "temperature": 0}


def test_content_may_come_in_parts(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert text_of(ask(client, parts)) == text_of(ask(client))


# workflow: W8
def test_a_text_is_continued_without_the_template(client, tiny_model, byte_tokenizer):
    reply = client.post("/v1/completions", json={"prompt": "once upon", "max_tokens": 4}).json()
    ids = byte_tokenizer("once upon")["input_ids"]
    expected = dict(generate_texts(tiny_model, byte_tokenizer, [ids], decoding={"max_new_tokens": 4}))[0]
    assert (reply["object"], reply["choices"][0]["text"]) == ("text_completion", expected)
    stream = client.post("/v1/completions", json={"prompt": "once upon", "max_tokens": 4, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events_of(stream)) == expected


def test_calls_are_taken_out_of_the_text_where_tools_were_given(client, monkeypatch):
    monkeypatch.setattr(Writer, "encode", lambda self, messages, tools, kwargs: [1, 2, 3])
    canned(monkeypatch, "Let me see.\n<tool_", 'call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    choice = ask(client, tools=tools).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    deltas = [event["choices"][0] for event in events_of(ask(client, tools=tools, stream=True))]
    assert deltas[1]["delta"]["tool_calls"][0]["index"] == 0
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert "<tool_call>" in text_of(ask(client))


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bpe_tokenizer", "sentencepiece_like_tokenizer"])
def test_streamed_pieces_are_whole_characters_and_join_to_the_decoded_text(kind, request, tiny_model):
    tokenizer = request.getfixturevalue(kind)
    pieces = []
    pen = answer._Pen(Writer(tiny_model, tokenizer), [], pieces.append)
    ids = tokenizer("the answer: 第八 🕷️ is yes", add_special_tokens=False)["input_ids"]
    for token in [ids, *ids]:  # the first is the prompt
        pen.put(token if isinstance(token, list) else torch.tensor([token]))
    pen.finish()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


# ---------------------------------------------------------------------------------------------------- refusals


# workflow: W8
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [{"role": "usr", "content": "x"}]}, "role is 'usr'. Did you mean 'user'?"),
        ({"messages": []}, "messages is an empty list; expected a list with at least one message"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads only text"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": "x"}]}, *HELLO]},
            r"messages\[1\].tool_calls is a list .*; expected a list of calls, each a function with a name",
        ),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a number from 0 to 2"),
        ({"temperature": 3}, "temperature is 3; expected a number from 0 to 2"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number from 1 on"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"stop": [1]}, r"stop is a list \(\[1\]\); expected a text"),
        ({"stream": "yes"}, "stream is 'yes'; expected true or false"),
        ({"n": 2}, "n is 2; this server knows only 1"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"tool_choice": "required"}, "the model itself decides here"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' is set by the server"),
        ({"temprature": 1}, "Unknown option 'temprature'. Did you mean 'temperature'?"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "the model reads 2,048 at most"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_sentence(client, change, message):
    response = client.post("/v1/chat/completions", json={"messages": HELLO} | change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert re.search(message, error["message"]), error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_conversation_that_the_template_refuses_is_the_clients_mistake(tiny_model, byte_tokenizer):
    template = "{{ raise_exception('no system here') }}"
    app = create_api(Writer(tiny_model, byte_tokenizer, chat_template=template), name="tiny")
    with TestClient(app, base_url=HERE) as client:
        assert (ask(client).status_code, "no system here" in ask(client).text) == (400, True)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "a JSON list; expected an object"),
        (b"\xff", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b'{"messages": "\\ud800"}', "application/json", 400, "surrogates"),
        (b"{}", "text/plain", 415, "application/json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client, body, kind, status, message):
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


# reliability: 66
def test_a_huge_body_is_refused_whether_or_not_it_tells_its_size(client):
    headers = {"content-type": "application/json"}
    parts = (b" " * 65536 for _ in range(BODY_LIMIT // 65536 + 1))
    for body in (b" " * (BODY_LIMIT + 1), parts):
        response = client.post("/v1/chat/completions", content=body, headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")


# reliability: 66
@pytest.mark.parametrize("path", ["/..%2f..%2fetc/passwd", "/../serve.py", "/pages/chat.html", "/%2e%2e/"])
def test_no_file_is_served_by_its_path(client, path):
    assert client.get(path).status_code == 404


def test_a_failure_of_the_model_tells_the_client_nothing_of_the_inside(client, monkeypatch):
    def fail(*args):
        raise RuntimeError("secret /home/somebody")

    monkeypatch.setattr(Writer, "write", fail)
    with TestClient(client.app, base_url=HERE, raise_server_exceptions=False) as client:
        response = ask(client)
        assert (response.status_code, "secret" in response.text) == (500, False)
        error = events_of(ask(client, stream=True))[-1]["error"]
    assert error["message"] == "The server failed: RuntimeError. Its log says more."


# ---------------------------------------------------------------------------------------------------- who may ask


# reliability: 66
def test_the_default_is_this_machine_only_and_needs_no_token(monkeypatch):
    monkeypatch.delenv(access.TOKEN_VARIABLE, raising=False)
    assert serving.serve.__kwdefaults__["host"] == "127.0.0.1"
    assert access.access_token("127.0.0.1") is access.access_token("localhost") is access.access_token("::1") is None
    drawn = {access.access_token(host) for host in ("0.0.0.0", "::", "192.168.1.5")}
    assert len(drawn) == 3
    assert all(len(token) >= 43 for token in drawn)  # 32 bytes
    monkeypatch.setenv(access.TOKEN_VARIABLE, "mine")
    assert access.access_token("127.0.0.1") == access.access_token("0.0.0.0") == "mine"


def test_on_another_host_the_token_is_printed_once(tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.delenv(access.TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(serving, "run_app", lambda app, listener: (listener.close(), seen.append(app.token)))
    seen, console = [], Console(file=io.StringIO(), width=40)
    serving.serve(tiny_model, byte_tokenizer, name="tiny", host="0.0.0.0", port=0, console=console)
    assert console.file.getvalue().count(seen[0]) == 1


# reliability: 66
def test_without_the_token_nothing_but_health_answers(writer):
    with TestClient(create_api(writer, name="tiny", token="a-token"), base_url="http://gpu-box:8000") as client:
        assert client.get("/health").status_code == 200
        for path in ("/", "/v1/models", "/settings", "/chat.js", "/nothing"):
            assert client.get(path).status_code == 401, path
        assert ask(client).json()["error"]["code"] == "invalid_api_key"
        for wrong in ("Bearer a-toke", "Bearer ", "Basic a-token", "a-token"):
            assert client.get("/v1/models", headers={"authorization": wrong}).status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer a-token"}).status_code == 200


def test_the_printed_address_puts_the_token_into_a_cookie(writer):
    with TestClient(create_api(writer, name="tiny", token="a-token"), base_url="http://gpu-box:8000") as client:
        response = client.get("/?token=a-token", follow_redirects=False)
        assert (response.status_code, response.headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=Strict"} <= set(response.headers["set-cookie"].split("; "))
        assert client.get("/v1/models").status_code == 200


def test_the_token_is_found_among_cookies_of_other_servers(writer):
    with TestClient(create_api(writer, name="tiny", token="a-token"), base_url="http://gpu-box:8000") as client:
        for cookies, status in (("foo/bar=1; tunesmith-8000=a-token", 200), ("foo/bar=1", 401), ("a; ;=", 401)):
            assert client.get("/v1/models", headers={"cookie": cookies}).status_code == status, cookies


@pytest.mark.parametrize(
    ("path", "place"),
    [("//evil.example/", "/evil.example/"), ("/%C4%83", "/%C4%83"), ("/a%0d%0ab:c", "/a%0D%0Ab%3Ac")],
)
def test_the_token_leads_to_no_other_server_and_writes_one_header(writer, path, place):
    with TestClient(create_api(writer, name="tiny", token="a-token"), base_url="http://gpu-box:8000") as client:
        response = client.get(f"http://gpu-box:8000{path}?token=a-token", follow_redirects=False)
        assert (response.status_code, response.headers["location"]) == (303, place)


# reliability: 66
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1:8000.evil"]
)
def test_a_page_of_another_origin_is_refused(client, origin):
    assert client.get("/v1/models", headers={"origin": origin}).status_code == 403
    assert client.post("/v1/chat/completions", json={}, headers={"origin": origin}).status_code == 403


def test_the_servers_own_page_may_ask(client):
    assert client.get("/v1/models", headers={"origin": HERE}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("0.0.0.0:8000", 403), ("", 403), ("[", 403),
        ("localhost:8000", 200), ("[::1]:8000", 200), ("127.0.0.1", 200),
    ],
)  # fmt: skip
def test_a_domain_that_was_pointed_here_is_refused(client, host, status):
    assert client.get("/health", headers={"host": host}).status_code == status


def test_every_answer_carries_the_security_headers(client):
    for path in ("/", "/chat.js", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert "content-security-policy" in client.get("/", headers={"host": "evil.example"}).headers


# ---------------------------------------------------------------------------------------------------- many at once


# reliability: 66
def test_parallel_requests_do_not_mix(writer):
    questions = [f"question number {number}" for number in range(6)]
    app = create_api(writer, name="tiny")

    async def all_at_once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
            bodies = [
                {
                    "messages": [{"role": "user", "content": question}],
                    "stream": place % 2 == 0, "temperature": place % 3, "seed": 5,
                }
                for place, question in enumerate(questions)
            ]  # fmt: skip
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies)), bodies

    together, bodies = asyncio.run(all_at_once())
    with TestClient(app, base_url=HERE) as client:
        for response, body in zip(together, bodies):
            alone = text_of(ask(client, **(body | {"stream": False})))
            assert (streamed_text(response) if body["stream"] else text_of(response)) == alone


def test_too_many_requests_are_sent_away(client, monkeypatch):
    monkeypatch.setattr("tunesmith.deliver.answer.Line.is_full", True)
    assert (ask(client).status_code, ask(client).json()["error"]["type"]) == (429, "rate_limit_error")


def endless(monkeypatch):
    """A model that writes until it is stopped. Returns: how many pieces each answer had when it was."""
    ended = []

    def write(self, asked, say, stopped):
        count = 0
        while not stopped() and count < 2000:
            say("word ")
            count += 1
            time.sleep(0.002)
        ended.append(count)
        return Written(count, "stop")

    monkeypatch.setattr(Writer, "write", write)
    return ended


# reliability: 66
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(writer, monkeypatch, stream):
    ended = endless(monkeypatch)
    with running(create_api(writer, name="tiny")) as address:
        body = {"messages": HELLO, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.3)
        wait_for(lambda: ended)
        assert ended[0] < 1500
        ended.clear()
        with pytest.raises(httpx.ReadTimeout):  # the next one has its turn
            httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": False}, timeout=0.3)
        wait_for(lambda: ended)


def test_a_client_that_leaves_the_line_is_not_answered(writer, monkeypatch):
    ended = endless(monkeypatch)
    with running(create_api(writer, name="tiny")) as address:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={"messages": HELLO, "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/chat/completions", json={"messages": HELLO}, timeout=0.3)
            time.sleep(0.3)
        wait_for(lambda: len(ended) == 2)
    assert ended[1] == 0


class running:
    """The application behind a real socket."""

    def __init__(self, app):
        import uvicorn

        self.listener = access.listen("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started)
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


def wait_for(is_so, seconds=10):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- the start


# reliability: 58
def test_missing_libraries_are_named_with_the_extra(tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(access.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"starlette and uvicorn .* pip install 'tunesmith\[serve\]'"):
        serving.serve(tiny_model, byte_tokenizer, name="tiny")


def test_a_port_that_is_taken_is_told(tiny_model, byte_tokenizer):
    with access.listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="Choose another --port"):
        serving.serve(tiny_model, byte_tokenizer, name="tiny", port=taken.getsockname()[1])


def test_a_token_that_no_header_can_carry_is_refused():
    with pytest.raises(ConfigError, match="TUNESMITH_TOKEN"):
        access.access_token("127.0.0.1", "two words")


# workflow: W8
# reliability: 65
def test_the_pages_need_no_network_and_put_text_in_as_text(client):
    assert "<textarea" in client.get("/").text
    files = sorted(path.name for path in PAGES.iterdir())
    assert files == ["chat.html", "chat.js", "studio.html", "studio.js", "tunesmith.css"]
    for name in files:
        content = (PAGES / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|//cdn|@import|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", content
        )
        assert not re.search(r"<script(?! src=\"/)|<style|\son\w+=|\sstyle=", content), name
