"""The worker of `make bench` that runs vLLM; it lives in .venv-vllm, and bench.py starts it there."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

from bench import ANSWER, Clock, find, serve

from ttsi import estimator, prompts, sources
from ttsi.engines.base import Request
from ttsi.engines.vllm import VllmEngine
from ttsi.types import LoraSettings, Sampling


class Served:
    """The worker that runs vLLM's engine, on as many threads as the machine has cores."""

    def __init__(self, model: str, dtype: str) -> None:
        self.engine = VllmEngine(sources.model_dir(model), dtype=dtype, threads=os.cpu_count())

    def batch(self, samples: Sequence[str]) -> dict[str, Any]:
        """What bench.py's own worker does with the same samples, each time from a cold prefix cache."""
        engine, clock = self.engine, Clock()
        queries = [find(s).query for s in samples]
        plain = [Request(prompts.act(q)) for q in queries]
        engine.generate(plain[:1], Sampling(max_tokens=2))  # starts vLLM's processes
        self._cold()
        with clock.stage("one by one"):
            one = [engine.generate([r], ANSWER)[0][0] for r in plain]
        self._cold()
        with clock.stage("together"):
            many = [r[0] for r in engine.generate(plain, ANSWER)]
        with clock.stage("H"):
            estimator.score(engine, queries)
        fresh = [engine.lora.fresh(LoraSettings(), i, engine.device) for i in range(len(plain))]
        self._cold()
        adapted = [Request(r.prompt, adapter=a) for r, a in zip(plain, fresh, strict=True)]
        with clock.stage("adapters"):
            under = [r[0] for r in engine.generate(adapted, ANSWER)]
        texts = [[g.tokens for g in group] for group in (one, many, under)]
        return {
            "n": len(queries),
            "tokens": sum(len(r.tokens) for r in many),
            "replies": [r.tokens for r in many],
            "equal": sum(len(set(row)) == 1 for row in zip(*texts, strict=True)),
            "seconds": clock.seconds,
            "version": _version(),
        }

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
