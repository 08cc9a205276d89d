"""Hundreds of adaptations in one process: memory, file handles, threads and temporary files stay flat.

TTSI_SOAK=20 makes it short, to see that it works; only the whole of it is evidence.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ledger import Row

from study.data import benchmarks
from study.data.judge import gold_calls
from study.data.models import model_dir
from ttsi import prompts, trainer
from ttsi.calls import format_calls
from ttsi.engines.base import Request
from ttsi.engines.torch import TorchEngine
from ttsi.types import Example, LoraSettings, Sample, Sampling

WARM = 10  # adaptations after which the process has all that it keeps
SHORT = int(os.environ.get("TTSI_SOAK", "0"))


@dataclass(frozen=True)
class Usage:
    """What the process holds. `resident` in bytes, of memory in use: what is free is given back first."""

    resident: int
    handles: int
    threads: int
    files: int


def usage(scratch: Path) -> Usage:
    gc.collect()
    if sys.platform == "linux":  # glibc keeps up to a few hundred MB of freed memory, now more, now less
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    me = psutil.Process()
    return Usage(
        me.memory_info().rss, me.num_fds(), me.num_threads(), sum(p.is_file() for p in scratch.rglob("*"))
    )


def adapt(engine: TorchEngine, sample: Sample, seed: int, epochs: int) -> None:
    """T and the answer after it, as a run does them; the example is the sample's own."""
    mode = ("activated", "exact")[seed % 2]
    example = Example(sample.query.question, gold_calls(sample), 1.0)
    job = trainer.job(sample.tools, [example], seed)
    (fitted,) = trainer.fit(engine, [job], LoraSettings(mode=mode, epochs=epochs))  # type: ignore[arg-type]
    assert fitted is not None
    request = Request(prompts.act(sample.query), seed, adapter=fitted[0], lookup=True)
    assert engine.generate([request], Sampling(max_tokens=16))[0]


@pytest.mark.parametrize(("model", "count", "epochs"), [("tiny", 500, 3), ("smollm2-135m", 300, 1)])
def test_nothing_grows(
    model: str,
    count: int,
    epochs: int,
    ledger: Callable[..., Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = SHORT or count
    row = ledger(
        f"adaptations (epochs: {epochs}) and answers in one process, {model}, both modes",
        f"after {WARM}: memory within 2 %, file handles, threads and temporary files as many as then",
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = model_dir(model)
    # The prefix cache is bounded and fills for a while: small here, so that it is full when measuring begins.
    engine = TorchEngine(folder, dtype="float32", threads=1, prefix_limit=32 << 20)
    samples = short(engine, benchmarks.load("fixture"))
    curve: list[Usage] = []
    for i in range(count):
        adapt(engine, samples[i % WARM], i, epochs)
        done = i + 1
        if done == WARM or (done > WARM and done % max(1, count // 10) == 0):
            curve.append(usage(tmp_path))
            print(f"{model} {done:4d}: {curve[-1]}", flush=True)
    first, last = curve[0], curve[-1]
    assert last.resident <= 1.02 * first.resident
    assert (last.handles, last.threads, last.files) == (first.handles, first.threads, first.files)
    row.tries = count
    row.seen = (
        f"{first.resident / 1e6:.0f} MB after {WARM}, {last.resident / 1e6:.0f} MB at the end (at most "
        f"{max(u.resident for u in curve) / 1e6:.0f}), {last.handles} handles, {last.threads} threads, "
        f"{last.files} temporary files"
    )


def short(engine: TorchEngine, samples: Sequence[Sample]) -> list[Sample]:
    """The WARM samples with the fewest tokens: the longest run is enough at their length."""
    by_length = sorted(samples, key=lambda s: len(engine.encode(prompts.act(s.query), reply=reply(s)).ids))
    return by_length[:WARM]


def reply(sample: Sample) -> str:
    return format_calls(gold_calls(sample))
