"""The engine behind an endpoint, against real servers on this machine: a hostile one and a tiny model's."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from study.data import benchmarks, fixture
from ttsi import prompts, synthesizer
from ttsi.engines.base import EngineError, Prompt, Request, TooLong
from ttsi.engines.openai import BudgetSpent, Endpoint, OpenAIEngine, Refused
from ttsi.types import Message, Sampling

KEY = "sk-0123456789-abcdefghij"
ANSWER = Callable[["Handler", dict[str, Any]], None]


def said(text: str | None, finish: str = "stop", usage: Any = (11, 5)) -> bytes:
    reply: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": 0}
    return json.dumps(reply).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((time.monotonic(), self.path, dict(self.headers), body))
            answer = self.server.script.pop(0) if self.server.script else self.server.answer
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            answer(self, body)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Stub(ThreadingHTTPServer):
    """A server that answers as scripted, one entry per request, then with `answer`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[tuple[float, str, dict[str, str], dict[str, Any]]] = []
        self.script: list[ANSWER] = []
        self.answer: ANSWER = lambda handler, body: handler.send(200, said(body["messages"][-1]["content"]))
        self.busy = self.busiest = 0
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that hung up is what some tests are about."""


def status(code: int, message: str = "", kind: str = "", **headers: str) -> ANSWER:
    data = json.dumps({"error": {"message": message, "code": kind}}).encode()
    return lambda handler, body: handler.send(code, data, **headers)


def raw(data: bytes) -> ANSWER:
    return lambda handler, body: handler.send(200, data)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """Bytes that never end, each soon enough for a read's own timeout."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def reset(handler: Handler, body: dict[str, Any]) -> None:
    """Half an answer, then a reset connection."""
    data = said("never whole")
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def slow(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(1.0)
    handler.close_connection = True


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def connect(stub: Stub, tmp_path: Path) -> Iterator[Callable[..., OpenAIEngine]]:
    """Makes engines for the stub, all with one ledger."""
    made = []

    def make(**settings: Any) -> OpenAIEngine:
        given = {"base_url": stub.address, "model": "m", "key_env": "TEST_KEY", "backoff": 0.01, "timeout": 5}
        engine = OpenAIEngine.from_settings(given | settings, ledger=tmp_path / "ledger.sqlite")
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def ask(text: str, seed: int = 0, **more: Any) -> Request:
    return Request(Prompt("Be brief.", (Message("user", text),)), seed=seed, **more)


def texts(engine: OpenAIEngine, *questions: str, **sampling: Any) -> list[str]:
    rows = engine.generate([ask(q) for q in questions], Sampling(**sampling))
    return [reply.text for row in rows for reply in row]


# --- what is sent and what comes back -----------------------------------------------------------------


def test_replies_come_in_order_and_the_key_in_the_header(stub: Stub, connect: Any) -> None:
    def echo(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.02)
        handler.send(200, said(body["messages"][-1]["content"]))

    stub.answer = echo
    questions = [f"q{i}" for i in range(20)]
    assert texts(connect(), *questions) == questions
    assert len(stub.requests) == 20
    for _, path, headers, body in stub.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps(body)
    assert 1 < stub.busiest <= 4


def test_decoding_is_the_endpoints_own_unless_asked_for(stub: Stub, connect: Any) -> None:
    sampling = Sampling(0.7, 0.8, 20, 1.1, max_tokens=50)
    for settings in (
        {},
        {"decoding": "openai"},
        {"decoding": "vllm", "reply_tokens": 900, "limit_field": "max_completion_tokens"},
        {"extra": {"reasoning_effort": "low"}},
    ):
        connect(**settings).generate([ask("x", seed=3)], sampling)
    plain, seeded, full, more = ({k: v for k, v in r[3].items() if k != "messages"} for r in stub.requests)
    assert plain == {"model": "m", "max_tokens": 50}
    assert seeded == plain | {"temperature": 0.7, "top_p": 0.8, "seed": 3}
    assert full == {
        "model": "m",
        "max_completion_tokens": 900,
        "temperature": 0.7,
        "top_p": 0.8,
        "seed": 3,
        "top_k": 20,
        "repetition_penalty": 1.1,
    }
    assert more == plain | {"reasoning_effort": "low"}


def test_every_turn_reaches_the_endpoint(stub: Stub, connect: Any) -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("tool", "c"), Message("user", "d"))
    connect().generate([Request(Prompt("s", turns))], Sampling())
    sent = [(m["role"], m["content"]) for m in stub.requests[0][3]["messages"]]
    result = ("user", "<tool_response>\nc\n</tool_response>")
    assert sent == [("system", "s"), ("user", "a"), ("assistant", "b"), result, ("user", "d")]


@pytest.mark.parametrize(
    ("content", "finish", "opening", "text", "finished"),
    [
        ("Question: a\nAnswer: b", "stop", "Question:", "Question: a\nAnswer: b", True),
        ("Sure!\n\nQuestion: a", "stop", "Question:", "Question: a", True),
        ("no such thing", "stop", "Question:", "no such thing", True),
        ("cut", "length", "", "cut", False),
        (None, "length", "", "", False),
        ("\x00\x1b[31m é 😀", "stop", "", "\x00\x1b[31m é 😀", True),
    ],
)
def test_a_reply(
    stub: Stub, connect: Any, content: str | None, finish: str, opening: str, text: str, finished: bool
) -> None:
    stub.answer = raw(said(content, finish))
    for _ in range(2):  # from the endpoint, then from the ledger
        reply = connect().generate([ask("x", opening=opening)], Sampling())[0][0]
        assert (reply.text, reply.finished) == (text, finished)
        assert (reply.prompt_tokens, len(reply.tokens), reply.log_probs) == (11, 5, ())
    assert len(stub.requests) == 1


def test_what_it_cannot_do_is_said(connect: Any) -> None:
    with pytest.raises(NotImplementedError, match="can't score"):
        connect().score([], "", [])
    with pytest.raises(NotImplementedError, match="no adapter"):
        connect().generate([ask("x", adapter=object())], Sampling())
    with pytest.raises(NotImplementedError, match="no grammar"):
        connect().generate([ask("x", grammar="start: /.*/")], Sampling())


# --- the ledger ---------------------------------------------------------------------------------------


def test_a_second_run_asks_for_nothing_and_needs_no_key(
    stub: Stub, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = texts(connect(price_prompt=2, price_completion=10), "a", "b", "a", n=2)
    assert len(stub.requests) == 4, "a question asked twice in one call is sent once"
    monkeypatch.delenv("TEST_KEY")
    again = connect(price_prompt=2, price_completion=10)
    assert texts(again, "a", "b", "a", n=2) == first
    assert again.loaded == 4 and len(stub.requests) == 4
    usage = again.usage
    assert (usage.requests, usage.failed) == (4, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (44, 20)
    assert usage.cost == pytest.approx((44 * 2 + 20 * 10) / 1e6)


def test_another_seed_or_setting_is_another_request(stub: Stub, connect: Any) -> None:
    for seed in (0, 1):  # the seed is not sent, but a retry must not get the same reply again
        connect().generate([ask("a", seed)], Sampling())
    connect(extra={"top_p": 0.5}).generate([ask("a")], Sampling())
    connect(model="other").generate([ask("a")], Sampling())
    connect().generate([ask("a")], Sampling(max_tokens=9))
    assert len(stub.requests) == 5
    connect(concurrency=1, timeout=9, max_requests=90).generate([ask("a")], Sampling())
    assert len(stub.requests) == 5


def test_a_damaged_reply_is_asked_for_again(stub: Stub, connect: Any) -> None:
    engine = connect()
    texts(engine, "a")
    engine._ledger._db.execute("UPDATE reply SET value = substr(value, 5)")
    assert texts(connect(), "a") == ["a"]
    assert len(stub.requests) == 2
    assert texts(connect(), "a") == ["a"]
    assert len(stub.requests) == 2


def test_usage_is_estimated_where_it_is_not_told(stub: Stub, connect: Any) -> None:
    stub.answer = raw(said("x" * 300, usage=None))
    engine = connect()
    reply = engine.generate([ask("a")], Sampling())[0][0]
    assert len(reply.tokens) == engine.usage.completion_tokens == 101
    assert engine.usage.prompt_tokens > 20


# --- budget -------------------------------------------------------------------------------------------


def test_a_budget_in_requests_is_never_exceeded(stub: Stub, connect: Any) -> None:
    engine = connect(max_requests=5)
    stub.script = [status(500)]  # a try that failed counts
    with pytest.raises(BudgetSpent, match="budget of 5 requests"):
        texts(engine, *(f"q{i}" for i in range(12)))
    assert len(stub.requests) == 5
    assert (engine.usage.requests, engine.usage.failed) == (5, 1)
    with pytest.raises(BudgetSpent):
        texts(connect(max_requests=5), "another")
    assert len(stub.requests) == 5, "the budget is counted over all runs"
    # What was had stays, and a larger budget goes on from there.
    assert texts(connect(), *(f"q{i}" for i in range(12))) == [f"q{i}" for i in range(12)]
    assert len(stub.requests) == 5 + 12 - 4


def test_a_budget_in_tokens_stops_soon(stub: Stub, connect: Any) -> None:
    with pytest.raises(BudgetSpent, match=r"40 tokens is spent \(48 used\)"):
        texts(connect(max_total_tokens=40, concurrency=1), *"abcdefgh")
    assert len(stub.requests) == 3


# --- failures that pass -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        status(500),
        status(503, "busy"),
        status(429, "slow down", Retry_After="0"),
        status(408),
        raw(b"{broken"),
        raw(b""),
        raw(b"\xff\xfe"),
        raw(b"[" * 100_000),
        raw(b'{"choices": []}'),
        raw(b'{"error": {"message": "overloaded"}}'),
        raw(b'{"choices": [{"message": {"content": 7}}]}'),
        raw(said("x", usage=(-1, 10**30))),
        raw(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        reset,
    ],
)
def test_trouble_that_passes(stub: Stub, connect: Any, trouble: ANSWER) -> None:
    stub.script = [trouble, trouble]
    engine = connect()
    assert texts(engine, "a") == ["a"]
    assert len(stub.requests) == 3
    assert (engine.usage.requests, engine.usage.failed) == (3, 2)


def test_trouble_that_stays_is_the_machines(stub: Stub, connect: Any) -> None:
    stub.answer = status(502)
    engine = connect(attempts=3)
    with pytest.raises(EngineError, match=r"127.0.0.1:\d+: HTTP 502 \(3 tries\)"):
        texts(engine, "a")
    assert len(stub.requests) == 3
    with pytest.raises(EngineError, match=r"1 try"):
        texts(engine, "b")
    assert len(stub.requests) == 4, "an endpoint that is down costs one try, until it answers"
    stub.answer = raw(said("up"))
    assert texts(engine, "c") == ["up"]
    stub.script = [status(502)]
    assert texts(engine, "d") == ["up"]


def test_one_failure_loses_no_other_reply(stub: Stub, connect: Any) -> None:
    def picky(handler: Handler, body: dict[str, Any]) -> None:
        bad = body["messages"][-1]["content"] == "bad"
        (status(400, "no") if bad else raw(said("fine")))(handler, body)

    stub.answer = picky
    with pytest.raises(EngineError, match="refused the request"):
        texts(connect(), "a", "bad", "b")
    assert len(stub.requests) == 3
    assert texts(connect(), "a", "b") == ["fine", "fine"]
    assert len(stub.requests) == 3


@pytest.mark.parametrize("trouble", [slow, drip])
def test_a_slow_endpoint_is_not_waited_for(stub: Stub, connect: Any, trouble: ANSWER) -> None:
    stub.answer = trouble
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"within 0\.3 s"):
        texts(connect(timeout=0.3, attempts=2), "a")
    assert time.monotonic() - began < 2
    assert len(stub.requests) == 2


def test_nobody_there(connect: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=r"connection failed \(ConnectError\) \(2 tries\)"):
        texts(connect(base_url=f"http://127.0.0.1:{port}", attempts=2), "a")


def test_an_endless_answer_is_cut(stub: Stub, connect: Any) -> None:
    def flood(handler: Handler, body: dict[str, Any]) -> None:
        handler.send(200, b" " * (9 << 20))

    stub.answer = flood
    with pytest.raises(EngineError, match="more than 8 MiB"):
        texts(connect(), "a")


@pytest.mark.parametrize("wait", ["1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_honoured_by_all(stub: Stub, connect: Any, wait: Any) -> None:
    header = wait() if callable(wait) else wait  # a date has whole seconds: 2 ahead is at least 1
    stub.script = [status(429, Retry_After=header)]
    texts(connect(concurrency=1), "a", "b")
    first, second, _ = (r[0] for r in stub.requests)
    assert 0.9 < second - first < 3


def test_a_wait_beyond_patience_is_a_failure(stub: Stub, connect: Any) -> None:
    stub.answer = status(429, Retry_After="86400")
    with pytest.raises(EngineError, match="asks for a wait of 86400 s"):
        texts(connect(), "a")
    assert len(stub.requests) == 1


@pytest.mark.parametrize("header", ["nan", "-5", "soon", "Mon, 99 Foo 99999 99:99:99 GMT", "\x7f"])
def test_a_senseless_retry_after_is_ignored(stub: Stub, connect: Any, header: str) -> None:
    stub.script = [status(503, Retry_After=header)]
    assert texts(connect(), "a") == ["a"]


def test_waits_grow_and_differ(stub: Stub, connect: Any) -> None:
    stub.answer = status(500)
    waits = []
    for question in "ab":
        start = len(stub.requests)
        with pytest.raises(EngineError):
            texts(connect(attempts=5, backoff=0.05), question)
        times = [r[0] for r in stub.requests[start:]]
        waits.append([b - a for a, b in itertools.pairwise(times)])
    assert all(w < 0.05 * 2**i + 0.3 for row in waits for i, w in enumerate(row))
    assert max(map(max, waits)) > 0.05
    assert waits[0] != pytest.approx(waits[1], abs=1e-3)


# --- failures for good --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (status(401, f"Incorrect API key provided: {KEY}"), "refused the key in TEST_KEY (HTTP 401)"),
        (status(403), "refused the key in TEST_KEY (HTTP 403)"),
        (status(404), "has no model 'm', or is the wrong address"),
        (status(429, "…", "insufficient_quota"), "the account of the key in TEST_KEY has no quota left"),
        (status(302, Location="http://127.0.0.1:9/"), "leads elsewhere (HTTP 302)"),
    ],
)
def test_a_refusal_is_one_sentence_and_one_request(
    stub: Stub, connect: Any, answer: ANSWER, message: str
) -> None:
    stub.answer = answer
    engine = connect(concurrency=1)
    for questions in ("abc", "d"):
        with pytest.raises(Refused) as caught:
            texts(engine, *questions)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(stub.requests) == 1


def test_no_key(stub: Stub, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad, message in (
        (None, "put it into the environment as TEST_KEY"),
        ("", "put it into the environment as TEST_KEY"),
        ("two words", "no key has"),
        ("sk-1\nX-Injected: 1", "no key has"),
        ("schlüssel", "no key has"),
    ):
        monkeypatch.delenv("TEST_KEY") if bad is None else monkeypatch.setenv("TEST_KEY", bad)
        engine = connect()
        with pytest.raises(Refused, match=message) as caught:
            texts(engine, "a")
        assert not bad or bad not in str(caught.value)
        monkeypatch.setenv("TEST_KEY", KEY)
    assert stub.requests == []


def test_an_endpoint_without_a_key(stub: Stub, connect: Any) -> None:
    texts(connect(key_env=None), "a")
    assert "Authorization" not in stub.requests[0][2]
    stub.answer = status(401)
    with pytest.raises(Refused, match="wants a key"):
        texts(connect(key_env=None), "b")


def test_too_long_and_withheld(stub: Stub, connect: Any) -> None:
    stub.script = [
        status(400, "This model's maximum context length is 4096 tokens."),
        status(400, "…", "context_length_exceeded"),
        raw(said("", "content_filter")),
    ]
    engine = connect()
    for kind in (TooLong, TooLong, EngineError):
        with pytest.raises(kind):
            texts(engine, "a")
    assert len(stub.requests) == 3


def test_the_key_is_nowhere(
    stub: Stub, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where an endpoint quotes it, not in logs of any level, not in errors, not in the ledger."""
    caplog.set_level(logging.DEBUG)
    engine = connect(attempts=2)
    told = []
    for answer in (
        status(400, f"bad header Bearer {KEY}"),
        status(500, f"crashed on {KEY}"),
        status(401, KEY),
    ):
        stub.answer = answer
        with pytest.raises(EngineError) as caught:
            texts(connect(attempts=2), "a")
        told += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    stub.answer = raw(said(f"Your key is {KEY}."))
    assert texts(engine, "b") == ["Your key is [key]."]
    told += [repr(engine.endpoint), repr(vars(engine)), caplog.text]
    assert all(KEY not in text for text in told)
    engine.close()
    files = [p.read_bytes() for p in tmp_path.iterdir()]
    assert files and all(KEY.encode() not in data for data in files)


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_that_quotes_the_key_leaves_it_nowhere(
    stub: Stub, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """In the status line, in any header and in the body, as message, code or plain text; whoever logs."""
    for library in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, library)

    def quote(body: bytes) -> ANSWER:
        def answer(handler: Handler, _: dict[str, Any]) -> None:
            handler.send_response(code, f"no such key {KEY}")
            handler.send_header("WWW-Authenticate", f'Bearer error="invalid_token", token="{KEY}"')
            handler.send_header("Retry-After", KEY)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return answer

    for body in (
        json.dumps({"error": {"message": f"bad key {KEY}", "code": KEY}}),
        json.dumps({"error": KEY}),
        f"<html>{KEY}</html>",
    ):
        stub.answer = quote(body.encode())
        engine = connect()
        with pytest.raises(Refused) as caught:
            texts(engine, "a")
        error = caught.value
        told = [str(error), repr(error.args), repr(error.__cause__), repr(error.__context__)]
        assert all(KEY not in text for text in [*told, repr(vars(engine))])
        engine.close()
    assert "POST" in caplog.text, "the libraries were listened to"
    assert KEY not in caplog.text
    files = [p.read_bytes() for p in tmp_path.iterdir()]
    assert files and all(KEY.encode() not in data for data in files)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "ftp://example.org"},
        {"base_url": "example.org/v1"},
        {"base_url": f"https://user:{KEY}@example.org"},
        {"base_url": f"https://example.org/v1?key={KEY}"},
        {"base_url": "http://exa mple.org:x"},
        {"api_key": KEY},
        {"extra": {"messages": []}},
        {"model": ""},
        {"concurrency": 0},
    ],
)
def test_wrong_settings_are_refused_without_quoting_them(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Endpoint.model_validate({"base_url": "https://example.org/v1", "model": "m"} | settings)
    assert KEY not in str(caught.value)


def test_the_fingerprint_is_of_what_affects_a_reply() -> None:
    base = {"base_url": "https://example.org/v1/", "model": "m"}
    mark = Endpoint.model_validate(base).fingerprint
    for same in ({"base_url": "https://example.org/v1"}, {"timeout": 3}, {"key_env": "X"}, {"attempts": 1}):
        assert Endpoint.model_validate(base | same).fingerprint == mark
    for other in ({"model": "n"}, {"decoding": "vllm"}, {"extra": {"a": 1}}, {"reply_tokens": 4}):
        assert Endpoint.model_validate(base | other).fingerprint != mark


# --- a real model behind a real server ----------------------------------------------------------------


def test_a_real_model_teaches_through_an_endpoint(stub: Stub, connect: Any) -> None:
    """The tiny model, served: the same greedy text as without a server between, and G through it."""
    from study.data.models import model_dir
    from ttsi.engines.torch import TorchEngine

    served = TorchEngine(model_dir("tiny"), dtype="float32", threads=1)
    turn = threading.Lock()

    def complete(handler: Handler, body: dict[str, Any]) -> None:
        system, *rest = body["messages"]
        prompt = Prompt(system["content"], tuple(Message(m["role"], m["content"]) for m in rest))
        sampling = Sampling(body["temperature"], body["top_p"], max_tokens=body["max_tokens"])
        with turn:
            reply = served.generate([Request(prompt, body["seed"])], sampling)[0][0]
        finish = "stop" if reply.finished else "length"
        handler.send(200, said(reply.text, finish, (reply.prompt_tokens, len(reply.tokens))))

    stub.answer = complete
    engine = connect(decoding="openai", timeout=60)
    samples = [benchmarks.to_sample(r, "fixture", i) for i, r in enumerate(fixture.records("test")[:8])]
    queries = [s.query for s in samples]
    requests = [Request(prompts.act(q)) for q in queries]
    here = served.generate(requests, Sampling(max_tokens=64))
    there = engine.generate(requests, Sampling(max_tokens=64))
    for a, b in zip(here, there, strict=True):
        assert (b[0].text, b[0].finished, len(b[0].tokens)) == (a[0].text, a[0].finished, len(a[0].tokens))
        assert b[0].prompt_tokens == a[0].prompt_tokens

    sampling = Sampling(0.7, 0.8, max_tokens=96)
    written = synthesizer.synthesize(engine, queries, lambda _, attempt: attempt, sampling, retries=1)
    assert any(w.examples for w in written)
    asked = len(stub.requests)
    again = synthesizer.synthesize(connect(decoding="openai"), queries, lambda _, a: a, sampling, retries=1)
    assert again == written and len(stub.requests) == asked


# --- side fields and errors in a good status -----------------------------------------------------------------


def choice(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"message": {"content": content}, "finish_reason": "stop", **more}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [choice()], "usage": {"prompt_tokens": 7}},
        {"choices": [choice()], "usage": {"prompt_tokens": 7, "completion_tokens": None}},
        {"choices": [choice()], "usage": {}},
        {"choices": [choice()], "usage": None},
        {"choices": [choice()], "usage": "free"},
        {"choices": [choice()], "usage": [7]},
        {"choices": [choice([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}])]},
        {
            "choices": [
                choice(
                    [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "hello"}]
                )
            ]
        },
        {"choices": [choice(["hello"])]},
        {"choices": [{"message": {"content": "hello"}}]},
        {"choices": [choice(finish_reason=["stop"])]},
        {"choices": [choice(logprobs={"content": "odd"}, error=None)], "error": None, "id": 5},
    ],
)
def test_a_good_reply_is_kept_whatever_stands_beside_it(stub: Stub, connect: Any, answer: Any) -> None:
    stub.answer = raw(json.dumps(answer).encode())
    engine = connect()
    assert texts(engine, "a") == ["hello"]
    assert len(stub.requests) == 1
    assert engine.usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ({"error": {"code": 402, "message": "out of credit"}}, "out of credit", 1),
        ({"error": {"code": "402", "message": "out of credit"}, "choices": []}, "out of credit", 1),
        ({"error": {"code": "insufficient_quota", "message": "none"}}, "no quota", 1),
        ({"error": {"code": "invalid_request_error", "message": "bad seed"}}, "bad seed", 1),
        ({"choices": [choice("par", error={"code": 400, "message": "broke off"})]}, "broke off", 1),
        ({"choices": [choice("par", finish_reason="error")]}, "without a reply", 3),
        ({"error": {"code": 503, "message": "busy"}}, "busy", 3),
        ({"error": {"message": "overloaded"}}, "overloaded", 3),
        ({"error": "overloaded"}, "overloaded", 3),
    ],
)
def test_an_error_in_a_good_status_is_a_failure_with_its_message(
    stub: Stub, connect: Any, answer: Any, said: str, requests: int
) -> None:
    stub.answer = raw(json.dumps(answer).encode())
    for _ in range(2):  # and never kept as a reply
        with pytest.raises(EngineError, match=said):
            texts(connect(attempts=3), "a")
    assert len(stub.requests) == 2 * requests
