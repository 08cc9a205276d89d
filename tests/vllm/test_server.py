"""A teacher behind vLLM's own OpenAI server, on this machine: SmolLM2 writes the examples of TT-D."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from ttsi import prompts, synthesizer
from ttsi.engines.base import Prompt, Request, TooLong
from ttsi.engines.openai import BudgetSpent, OpenAIEngine, Refused
from ttsi.types import Message, Sample, Sampling

KEY = "sk-loopback-0123456789"
CONTEXT = 2048


@pytest.fixture(scope="module")
def address(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "teacher"]
    command += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "512M"]
    command += ["--enforce-eager", "--block-size", "32"]
    log = tmp_path_factory.mktemp("server") / "log"
    surroundings = {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=os.environ | surroundings, stdout=out, stderr=out)
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server was not up in time: {log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def teacher(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIEngine]:
    monkeypatch.setenv("TEST_KEY", KEY)
    engine = connect(address, tmp_path)
    yield engine
    engine.close()


def connect(address: str, folder: Path, **settings: object) -> OpenAIEngine:
    given = {"base_url": address, "model": "teacher", "key_env": "TEST_KEY", "decoding": "vllm"}
    return OpenAIEngine.from_settings(given | settings, ledger=folder / "ledger.sqlite")


def test_it_writes_once_and_counts_what_it_used(
    teacher: OpenAIEngine, address: str, tmp_path: Path, samples: Sequence[Sample]
) -> None:
    queries = [s.query for s in samples[:4]]
    sampling = Sampling(0.7, 0.8, 20, 1.1, max_tokens=40)
    written = synthesizer.synthesize(teacher, queries, lambda _, attempt: attempt, sampling, retries=1)
    asked = teacher.usage
    assert asked.requests >= len(queries) and teacher.loaded == 0
    assert sum(w.tokens for w in written) == asked.completion_tokens
    again = connect(address, tmp_path)
    assert synthesizer.synthesize(again, queries, lambda _, a: a, sampling, retries=1) == written
    assert again.usage == asked and again.loaded == asked.requests
    again.close()


def test_its_counts_are_the_servers(teacher: OpenAIEngine, samples: Sequence[Sample]) -> None:
    request = Request(prompts.act(samples[0].query), seed=1)
    (first, second) = teacher.generate([request], Sampling(0.7, max_tokens=12, n=2))[0]
    assert 0 < len(first.tokens) <= 12 and first.text
    assert first.prompt_tokens == second.prompt_tokens > 50
    assert first.finished == (len(first.tokens) < 12)
    used = teacher.usage
    assert (used.requests, used.completion_tokens) == (2, len(first.tokens) + len(second.tokens))
    assert used.prompt_tokens == 2 * first.prompt_tokens


def test_what_the_server_refuses(
    address: str, tmp_path: Path, samples: Sequence[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(prompts.act(s.query), seed=i) for i, s in enumerate(samples[:2])]

    def ask(folder: str, asked: Sequence[Request] = requests, **settings: object) -> None:
        engine = connect(address, tmp_path / folder, **settings)
        engine.generate(asked, Sampling(max_tokens=2))

    monkeypatch.setenv("TEST_KEY", KEY)
    with pytest.raises(TooLong, match="context"):
        ask("long", [Request(Prompt("", (Message("user", "word " * CONTEXT),)))])
    with pytest.raises(BudgetSpent):
        ask("budget", max_requests=1, concurrency=1)
    with pytest.raises(Refused, match="no model"):
        ask("model", model="other")
    monkeypatch.setenv("TEST_KEY", "sk-wrong-0123456789")
    with pytest.raises(Refused, match="TEST_KEY"):
        ask("key")
