"""The programs that `make bench` sets beside `ours`, each for a process: requests in, seconds out.

Texts are written greedily here, with the paper's repetition penalty: a drawn example would differ between
programs, and so would its time. A call is required, as in profile `full`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from study.data import benchmarks
from study.data.models import model_dir
from ttsi import prompts
from ttsi.engines.base import Request
from ttsi.method import Method
from ttsi.types import PAPER_SAMPLING, LoraSettings, Sample, Sampling

ROWS = 8  # samples together, and replies in flight
WRITING = Sampling(repetition_penalty=PAPER_SAMPLING.repetition_penalty, max_tokens=256)
PAPERS = Method(writing=WRITING, retries=0, answer_opening=True)
SELECTIVE = Method("likelihood", 0.5, "surer", lora=LoraSettings(mode="activated"), answer_opening=True)


@cache
def samples_of(benchmark: str) -> dict[str, Sample]:
    """A benchmark's samples by id."""
    return {s.id: s for s in benchmarks.load(benchmark)}


def find(sample: str) -> Sample:
    """A sample by its id, whatever benchmark it is of."""
    return samples_of(sample.partition("-")[0])[sample]


class Clock:
    """Per stage: seconds, the peak resident memory (MB) while it ran, and what an engine counted."""

    def __init__(self, engine: Any = None) -> None:
        self.engine, self.stages = engine, dict[str, dict[str, float]]()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        reset_peak()
        before, began = self._counted(), time.perf_counter()
        yield
        took = {"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}
        self.stages[stage] = took | {k: v - before[k] for k, v in self._counted().items()}

    def _counted(self) -> dict[str, int]:
        names = ("decoded_tokens", "drafted", "accepted", "passes") if self.engine else ()
        return {name: getattr(self.engine.counters, name) for name in names}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def replies(
    engine: Any,
    samples: Sequence[str],
    cold: Any,
    ways: Sequence[str] = ("one by one", "together", "together, an adapter each (exact)"),
) -> dict[str, Any]:
    """Base answers, had in several ways: their tokens, and seconds from a cold prefix cache.

    An adapter each: a fresh one, which leaves the text as it is.
    """
    plain = [Request(prompts.act(find(s).query), opening=PAPERS.opening, lookup=True) for s in samples]
    fresh = [engine.lora.fresh(LoraSettings(), i, engine.device) for i in range(len(plain))]
    each = [replace(r, adapter=a) for r, a in zip(plain, fresh, strict=True)]
    asked = {
        "one by one": [[r] for r in plain],
        "together": [plain],
        "together, an adapter each (exact)": [each],
    }
    found: dict[str, Any] = {}
    for way in ways:
        cold()
        began = time.perf_counter()
        texts = [r[0].tokens for group in asked[way] for r in engine.generate(group, PAPERS.answering)]
        found[way] = {"seconds": time.perf_counter() - began, "tokens": texts}
    return found


class Served:
    """vLLM's engine, on as many threads as the machine has cores; it lives in .venv-vllm."""

    def __init__(self, model: str, dtype: str) -> None:
        from ttsi.engines.vllm import VllmEngine

        self.engine = VllmEngine(model_dir(model), dtype=dtype, threads=os.cpu_count())

    def replies(self, samples: Sequence[str]) -> dict[str, Any]:
        """What `Ours` does with the same samples."""
        request = Request(prompts.act(find(samples[0]).query))
        self.engine.generate([request], Sampling(max_tokens=2))  # starts vLLM's processes
        name = importlib.metadata.packages_distributions()["vllm"][0]
        version = f"{name} {importlib.metadata.version(name)}"
        return replies(self.engine, samples, self._cold) | {"version": version}

    def _cold(self) -> None:
        if not self.engine.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache")


class Theirs:
    """The usual loop."""

    def __init__(self, model: str, dtype: str) -> None:
        from study.bench.usual import UsualLoop

        self.loop = UsualLoop(model_dir(model), dtype)

    def sample(self, texts: dict[str, Any], base: bool) -> dict[str, Any]:
        """The whole loop on one sample, with the base answer first if asked for."""
        loop, clock, most = self.loop, Clock(), PAPERS.answering.max_tokens
        loop.clock, asked = clock, texts["prompt"] + texts["opening"]
        answer = None
        if base:
            with clock("base"):
                answer = texts["opening"] + loop.answer(asked, most)
        scores = loop.score(texts["prompt"], prompts.OPENING, texts["continuations"])
        written = loop.write(texts["write"], WRITING.max_tokens, WRITING.repetition_penalty)
        text, losses = loop.adapt_and_answer(
            texts["example"], texts["reply"], asked, most, asdict(LoraSettings()), texts["seed"]
        )
        return {
            "base": answer,
            "scores": scores,
            "written": written,
            "text": texts["opening"] + text,
            "losses": losses,
            "stages": clock.stages,
        }


def serve(worker: Any) -> None:
    """Answers one JSON request per line, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and their processes print must not pass for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        out.write(json.dumps(getattr(worker, asked.pop("do"))(**asked)) + "\n")
        out.flush()
