"""What goes wrong, or is meant to: each is answered as it should be, and others are served meanwhile."""

import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import NAME, TEMPLATE

LONG = {"max_tokens": 200, "min_tokens": 200, "temperature": 1}


@pytest.fixture(scope="module")
def server(servers):
    """A server of its own, so that what is measured of it is of these tests only."""
    return servers("--chat-template", TEMPLATE, "--max-num-seqs", 16, "--max-queue", 8)


@pytest.fixture(autouse=True)
def witness(request):
    """Somebody else, who asks the same all the while and once more afterwards, and must always be answered the same."""
    if "server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("server")
    wrong, seen, stop = [], set(), threading.Event()

    def ask():
        response = server.ask(prompt="It was a dark night", max_tokens=6, temperature=0)
        if response.status_code == 200:
            seen.add(response.json()["choices"][0]["text"])
        else:
            wrong.append(response.text)

    def go_on():
        while not stop.is_set():
            ask()
            time.sleep(0.05)

    thread = threading.Thread(target=go_on)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    ask()
    assert not wrong and len(seen) == 1, (wrong[:3], seen)
    server.quiet()


def connect(server):
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def raw(server, body, path="/v1/completions", headers=()):
    """A request as bytes, and all that comes back."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close", *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"content-length: {len(body)}")
    with connect(server) as stream:
        stream.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = b""
        while piece := stream.recv(65536):
            answer += piece
    status = int(answer.split(b" ", 2)[1])
    return status, answer.split(b"\r\n\r\n", 1)[1]


def refused(response, status=400, param=None):
    """It was refused with an error as OpenAI's are, and not by chance."""
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error["message"] and error["type"]
    assert len(response.content) < 20_000, "an error repeats what it was sent"
    if param:
        assert error["param"] == param, error
    return error["message"]


def test_a_client_that_goes_mid_stream_frees_its_place(server):
    before = server.quiet()["vllm:request_success_total"]
    for _ in range(5):
        with server.http.stream("POST", "/v1/completions", json={"model": NAME, "prompt": "On", "stream": True, **LONG}) as response:
            assert next(response.iter_lines())
    with ThreadPoolExecutor(4) as pool:
        def give_up(_):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "On and", "n": 4, **LONG}, timeout=0.05)
        list(pool.map(give_up, range(4)))
    after = server.quiet()
    aborted = re.findall(r'request_success_total\{finished_reason="abort".*\} (\d+)', server.http.get("/metrics").text)
    assert sum(map(int, aborted)) >= 5
    assert after["vllm:request_success_total"] > before
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_a_slow_reader_holds_up_nobody(server):
    body = json.dumps({"model": NAME, "prompt": "Slowly", "stream": True, "logprobs": 20, **LONG}).encode()
    with connect(server) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        begun = time.monotonic()
        for i in range(5):
            assert server.ask(prompt="Quickly", max_tokens=8, temperature=0).status_code == 200
        assert time.monotonic() - begun < 30
        answer = b""
        while piece := stream.recv(512):
            answer += piece
    assert answer.rstrip().endswith((b"data: [DONE]", b"0")), "the slow one lost the end"
    assert answer.count(b'"finish_reason":"length"') == 1


@pytest.mark.parametrize("name, body", [
    ("nothing", b""), ("no JSON", b"hello"), ("half of it", b'{"model": "' + NAME.encode() + b'", "prompt": "x"'),
    ("a list", b"[]"), ("a number", b"7"), ("null", b"null"), ("twice", b'{"prompt": "x"} {"prompt": "y"}'),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe\xc3\x28"}'), ("half a surrogate", b'{"prompt": "\\ud800"}'), ("NUL", b'\x00' * 100),
    ("deep lists", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep objects", b'{"prompt": "x", "user": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    ("NaN", b'{"prompt": "x", "temperature": NaN}'), ("Infinity", b'{"prompt": "x", "temperature": 1e999}'),
    ("a negative", b'{"prompt": "x", "max_tokens": -1}'), ("a huge number", b'{"prompt": "x", "max_tokens": 99999999999999999999999}'),
    ("a fraction", b'{"prompt": "x", "max_tokens": 1.5}'), ("a wrong type", b'{"prompt": {"a": 1}}'), ("a text as number", b'{"prompt": "x", "n": "many"}'),
    ("tokens that are none", b'{"prompt": [1, 2, 4000000000]}'), ("negative tokens", b'{"prompt": [-1]}'), ("no prompt", b'{}'), ("no tokens", b'{"prompt": []}'),
])
def test_malformed_bodies(server, name, body):
    status, answer = raw(server, body)
    assert status == 400, (name, status, answer[:300])
    assert json.loads(answer)["error"]["message"] and len(answer) < 20_000
    status, answer = raw(server, body, "/v1/chat/completions")
    assert status == 400, (name, status, answer[:300])


def test_a_body_of_100_mb(server):
    before = server.memory()
    piece = b"x" * 1_000_000

    def pieces():
        yield b'{"prompt": "'
        for _ in range(100):
            yield piece
        yield b'"}'
    refused(server.http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"}), 413)
    with connect(server) as stream:
        stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\n\r\n" + piece)
        # It goes away after a hundredth.
    assert server.memory() < before + 64_000_000, "it kept what it refused"


def test_a_body_that_never_comes(server):
    with connect(server) as idle, connect(server) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        idle.sendall(b"POST /v1/compl")
        assert server.ask(prompt="x", max_tokens=1).status_code == 200


def test_requests_that_are_no_http(server):
    for text in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
                 b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"):
        with connect(server) as stream:
            try:
                stream.sendall(text)
                stream.shutdown(socket.SHUT_WR)
                answer = stream.recv(1000)
            except OSError:
                # It may hang up at any time.
                answer = b""
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4", b"HTTP/1.1 505")), answer


def test_only_the_api_is_there(server):
    for path in ("/etc/passwd", "/../../etc/passwd", "/v1/../../etc/passwd", "/reports/..%2f..%2fCargo.toml", "/reports/%2e%2e/Cargo.toml",
                 "/v1/models/..%2f..%2fetc%2fpasswd", "/models", "/admin", "/.git/config", "//evil.example/", "/v1/models/" + "a" * 5000):
        response = server.http.get(server.url + path)
        assert response.status_code == 404, (path, response.status_code)
    assert server.http.delete("/v1/models").status_code == 405
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers={"origin": "https://evil.example"}).headers


def test_a_prompt_beyond_the_context(server):
    message = refused(server.ask(prompt="word " * 300))
    assert "256" in message
    refused(server.ask(prompt=[5] * 257))
    refused(server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "word " * 300}]))
    refused(server.ask(prompt="word " * 1_000_000))


def test_numbers_of_tokens(server):
    none = server.ask(prompt="It was", max_tokens=0)
    assert none.status_code == 200, none.text
    assert none.json()["choices"][0]["text"] == "" and none.json()["usage"]["completion_tokens"] == 0
    for huge in (10_000, 2**31, 2**53):
        response = server.ask(prompt="It was", max_tokens=huge, temperature=0)
        if response.status_code == 200:
            # The token after the last position is drawn too; nothing is computed of it.
            assert response.json()["usage"]["total_tokens"] <= 256
        else:
            refused(response, param="max_tokens")
    for wrong in (-1, 1.5, "ten", True, [1]):
        refused(server.ask(prompt="It was", max_tokens=wrong), param="max_tokens")


@pytest.mark.parametrize("name, values", [
    ("temperature", [-0.1, "hot", [1]]), ("top_p", [-1, 0, 1.1]), ("min_p", [-1, 2]), ("top_k", [-2, 1.5]),
    ("n", [0, -1, 1_000_000]), ("presence_penalty", [-3, 3]), ("frequency_penalty", [-3, 3]), ("repetition_penalty", [0, -1]),
    ("logprobs", [-1, 1_000_000]), ("prompt_logprobs", [-5, 1_000_000]), ("seed", [1.5, "x"]), ("stop", [7, [""], ["x" * 100_000]]),
    ("logit_bias", [{"1": 101}, {"-1": 1}, {"99999999": 1}, [1]]), ("stop_token_ids", [[-1], "x"]), ("min_tokens", [-1, 2**40]),
])
def test_parameters_that_mean_nothing(server, name, values):
    for value in values:
        refused(server.ask(prompt="x", max_tokens=2, **{name: value}), param=name)


def test_ten_thousand_stop_strings(server):
    begun = time.monotonic()
    refused(server.ask(prompt="x", max_tokens=50, stop=[f"stop {i}" for i in range(10_000)]), param="stop")
    assert server.ask(prompt="x", max_tokens=50, stop=[f"stop {i}" for i in range(64)]).status_code == 200
    assert time.monotonic() - begun < 30


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize("name, more", [
    ("a schema that is none", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "potato"}}}}),
    ("one that refers to a file", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "file:///etc/passwd"}}}}),
    ("one that refers to the network", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:1/x"}}}}),
    ("one that is deep", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(50)}}}),
    ("one that is too large", {"structured_outputs": {"json": {"enum": [f"value {i}" for i in range(200_000)]}}}),
    ("one that repeats", {"structured_outputs": {"json": {"type": "array", "minItems": 1_000_000_000, "items": {"type": "string", "minLength": 1_000_000}}}}),
    ("a regex that is none", {"structured_outputs": {"regex": "([a-z"}}),
    ("one that grows", {"structured_outputs": {"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"}}),
    ("one of many ways", {"structured_outputs": {"regex": "(a|a)*(a|a)*(a|a)*(a|a)*(a|a)*b"}}),
    ("a grammar that is none", {"structured_outputs": {"grammar": "start: )"}}),
    ("one without an end", {"structured_outputs": {"grammar": "start: start start | start"}}),
    ("no choice", {"structured_outputs": {"choice": []}}),
    ("two at once", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
])
def test_hostile_grammars(server, name, more):
    """Refused, or carried out: in bounded time, and nothing else is held up."""
    begun = time.monotonic()
    before = server.memory()
    response = server.ask(prompt="x", max_tokens=8, **more)
    assert response.status_code in (200, 400), (name, response.text[:300])
    if response.status_code == 400:
        refused(response)
    assert time.monotonic() - begun < 30, name
    assert server.memory() - before < 1_000_000_000, name


@pytest.mark.parametrize("template", [
    "{% for i in range(1000000000) %}x{% endfor %}", "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{{ 'x' * 10000000000 }}", "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
])
def test_templates_are_not_of_the_request(server, template):
    response = server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], chat_template=template, max_tokens=2)
    refused(response, param="chat_template")


def test_arguments_of_the_template_are_data(server):
    messages = [{"role": "user", "content": "x"}]
    for kwargs in ({"enable_thinking": "{{ 7 * 7 }}"}, {"enable_thinking": [[[[1]]]]}):
        assert server.ask("/v1/chat/completions", messages=messages, max_tokens=2, chat_template_kwargs=kwargs).status_code == 200
    for kwargs in ({"messages": "mine"}, {"unheard_of": 1}, {"enable_thinking": "x" * 5000, "tools": "y"}, "text", [1]):
        refused(server.ask("/v1/chat/completions", messages=messages, max_tokens=2, chat_template_kwargs=kwargs))
    response = server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "{{ 7 * 7 }}{% for %}"}], max_tokens=2)
    assert response.status_code == 200, "braces in a message are text"


@pytest.mark.parametrize("messages", [
    [], [{}], [{"role": "user"}], [{"role": 7, "content": "x"}], ["x"], "x", [{"role": "user", "content": 7}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
])
def test_conversations_that_are_none(server, messages):
    refused(server.ask("/v1/chat/completions", messages=messages, max_tokens=2))


def test_a_full_queue_sends_away(servers):
    server = servers("--max-num-seqs", 2, "--max-queue", 2)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda i: server.ask(prompt=f"Number {i}", **LONG), range(24)))
    good = [a for a in answers if a.status_code == 200]
    full = [a for a in answers if a.status_code in (429, 503)]
    assert len(good) + len(full) == 24 and len(good) >= 4 and full
    assert all(a.json()["usage"]["completion_tokens"] == 200 for a in good)
    assert all(int(a.headers["retry-after"]) >= 1 and a.json()["error"]["code"] == "overloaded" for a in full)
    assert server.quiet()["vllm:requests_refused_total"] == len(full)
    assert server.ask(prompt="Afterwards", max_tokens=2).status_code == 200


def test_a_full_cache_makes_sequences_give_way_and_all_end(servers):
    """Its least size is 64 MiB, which is less than 96 whole contexts."""
    server = servers("--max-num-seqs", 128, "--kv-cache-memory", 0.01)
    # All different, since what is the same is kept once.
    def ask(i):
        return server.ask(prompt=f"Number {i}", seed=i, temperature=1, max_tokens=240, min_tokens=240)

    with ThreadPoolExecutor(96) as pool:
        answers = list(pool.map(ask, range(96)))
    assert all(a.status_code == 200 for a in answers), [a.text for a in answers if a.status_code != 200][:2]
    assert all(a.json()["usage"]["completion_tokens"] == 240 for a in answers)
    for i in (0, 40, 95):
        assert ask(i).json()["choices"] == answers[i].json()["choices"], "giving way changed an answer"
    assert server.quiet()["vllm:num_preemptions_total"] > 0, "nothing had to give way: the test is too small"


def test_sigterm_under_load(servers):
    """Those under way are finished, new ones are sent away, and it ends well."""
    server = servers("--max-num-seqs", 8)
    outcomes = []

    def stream(i):
        text, ended = "", False
        with httpx.Client(base_url=server.url, timeout=60) as http:
            with http.stream("POST", "/v1/completions", json={"model": NAME, "prompt": f"Number {i}", "stream": True, **LONG}) as response:
                for line in response.iter_lines():
                    ended |= line == "data: [DONE]"
                    text += line
        outcomes.append((response.status_code, ended, text.count('"finish_reason":"length"')))

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    while sum(server.metrics()[f"vllm:num_requests_{state}"] for state in ("running", "waiting")) < 16:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    late = server.ask(prompt="Too late", max_tokens=2)
    assert late.status_code == 503 and late.headers["retry-after"] and late.json()["error"]["code"] == "shutting_down"
    assert server.http.get("/health").status_code == 503
    for thread in threads:
        thread.join(60)
    assert outcomes == [(200, True, 1)] * 16, outcomes
    assert server.process.wait(30) == 0, server.said()


def test_a_second_signal_does_not_wait(servers):
    server = servers()
    thread = threading.Thread(target=lambda: pytest.raises(httpx.HTTPError, server.ask, prompt="x", n=64, **LONG))
    thread.start()
    while not server.metrics()["vllm:num_requests_running"]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 130
    thread.join(10)
    # What the session looks at when it ends.
    server.stop = lambda: 0


def test_what_cannot_be_served_is_said_at_once(servers, server):
    port = urlsplit(server.url).port
    with pytest.raises(RuntimeError, match="cannot be listened on"):
        servers(port=port)
    for options, expected in [
        (("--reports", "/no/such/folder"), "no such folder"), (("--max-model-len", 100_000), "256 positions"),
        (("--api-key", ""), "empty"), (("--gpu-memory-utilization", 3), "from 0 to 1"),
    ]:
        with pytest.raises(RuntimeError, match=expected):
            servers(*options)
