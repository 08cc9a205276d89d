"""The worker of `make bench` that runs vLLM; it lives in .venv-vllm, and bench.py starts it there."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from bench import find, replies, serve

from study.data import sources
from ttsi import prompts
from ttsi.engines.base import Request
from ttsi.engines.vllm import VllmEngine
from ttsi.types import Sampling


class Served:
    """The worker that runs vLLM's engine, on as many threads as the machine has cores."""

    def __init__(self, model: str, dtype: str) -> None:
        self.engine = VllmEngine(sources.model_dir(model), dtype=dtype, threads=os.cpu_count())

    def replies(self, samples: Sequence[str]) -> dict[str, Any]:
        """What bench.py's own worker does with the same samples."""
        request = Request(prompts.act(find(samples[0]).query))
        self.engine.generate([request], Sampling(max_tokens=2))  # starts vLLM's processes
        return replies(self.engine, samples, self._cold) | {"version": _version()}

    def _cold(self) -> None:
        if not self.engine.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache")


def _version() -> str:
    name = importlib.metadata.packages_distributions()["vllm"][0]
    return f"{name} {importlib.metadata.version(name)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=["vllm"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    given = parser.parse_args()
    serve(Served(given.model, given.dtype))
