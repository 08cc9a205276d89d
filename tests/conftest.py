"""Fixtures shared by the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

LONGEST = [
    "goldens",
    "integration",
    "bench",
    "notebooks",
    "own_data",
    "readme",
    "engine",
    "study",
    "reproduction",
]
"""Test files that take the most seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the longest files, so that no process is left alone with one of them at the end."""
    place = {f"test_{name}": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


class Site:
    """A web server on this machine: serves `files` by path and keeps every request in `requests`.

    `silent`: it takes connections and never answers. `stalled`: paths whose body stops half-way, for
    good. `cut`: paths whose next answer ends half-way.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.silent = False
        self.stalled: set[str] = set()
        self.cut: set[str] = set()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                part = self.headers.get("Range", "")
                site.requests.append((self.command, self.path, part))
                while site.silent:
                    time.sleep(0.05)
                data = site.files.get(self.path)
                if data is None:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(part.removeprefix("bytes=").split("-")[0]) if part else 0
                self.send_response(206 if part else 200)
                if part:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/x")
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("Accept-Ranges", "bytes")
                # What huggingface_hub wants to see from a hub.
                self.send_header("ETag", f'"{abs(hash(data)):x}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if not body:
                    return
                half = (len(data) - start) // 2
                if self.path in site.stalled or self.path in site.cut:
                    self.wfile.write(data[start : start + half])
                    self.wfile.flush()
                    while self.path in site.stalled:
                        time.sleep(0.05)
                    site.cut.discard(self.path)
                    self.close_connection = True
                    return
                self.wfile.write(data[start:])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def count(self, path: str) -> int:
        """How many times a path's content was asked for."""
        return sum(1 for method, asked, _ in self.requests if method == "GET" and asked == path)

    def add_to_index(self, wheel: Path, project: str) -> str:
        """Offer a wheel as a package index would; its path on the server."""
        path = f"/files/{wheel.name}"
        self.files[path] = wheel.read_bytes()
        self.files[f"/simple/{project}/"] = f'<a href="{path}">{wheel.name}</a>'.encode()
        return path

    def close(self) -> None:
        self.silent = False
        self.stalled.clear()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A local web server that stands in for the hub, the package index and upstream."""
    server = Site()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2 model with random weights, loud enough that its replies differ."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from study.data.tiny import tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokens = tokenizer(["hello world user assistant system tool call name arguments"] * 10)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():
        parameter.data.copy_((3 * parameter).bfloat16())  # as weights are published
    tokens.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
