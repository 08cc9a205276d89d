"""vLLM under the contract of every engine, and what is its own: float32, a tiny model with random weights."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from contract import GREEDY, PROMPTS, EngineContract, loud, tokens
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from study.run.config import load_profile
from ttsi import trainer
from ttsi.engines import vllm
from ttsi.engines.base import EngineError, Prompt, Request
from ttsi.engines.torch import TorchEngine
from ttsi.engines.vllm import VllmEngine
from ttsi.types import LoraSettings, Message, Sampling

ONE = [Request(PROMPTS[0])]


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(tiny_folder, dtype="float32", threads=1)
    yield engine
    engine.close()


class TestVllmEngine(EngineContract):
    """What holds for every engine: tests/contract.py."""

    tolerance = 1e-3
    modes = ("exact",)


def children(name: str) -> list[psutil.Process]:
    """vLLM's processes of that name under this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's command line is gone as well
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def adapters_on_disk() -> list[Path]:
    return list(vllm._memory().glob(f"{vllm._FOLDER}{os.getpid()}-*"))


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_replies_are_drawn_from_transformers_own_distribution(
    shared: VllmEngine, k: int, penalty: float
) -> None:
    n = 1000
    sampling = Sampling(2.0, top_p=0.8, top_k=k, repetition_penalty=penalty, max_tokens=1, n=n)
    drawn = Counter(reply.tokens[0] for reply in shared.generate([Request(PROMPTS[0], seed=5)], sampling)[0])
    ids = torch.tensor([shared.encode(PROMPTS[0]).ids])
    with torch.no_grad():
        scores = shared.training.model(input_ids=ids).logits[:, -1].float()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors += [TemperatureLogitsWarper(2.0), *([TopKLogitsWarper(k)] if k else []), TopPLogitsWarper(0.8)]
    want = processors(ids, scores)[0].softmax(dim=-1)
    assert (want > 0).sum() > 2
    for token in {*drawn, *want.nonzero()[:, 0].tolist()}:
        p = want[token].item()
        assert abs(drawn[token] - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5 + 1e-6, (token, p)


def test_a_prefix_is_read_once(shared: VllmEngine) -> None:
    prompt = Prompt("some tools " * 60, (Message("user", "hello"),))
    texts = [f"tool {i}" for i in range(6)]
    length = len(shared.encode(prompt).ids)
    read, cached = shared.prompt_tokens, shared.cached_tokens
    shared.score([prompt], "call ", [texts])
    assert shared.prompt_tokens - read > 6 * length
    assert shared.cached_tokens - cached > 5 * (length - vllm._CPU_BLOCK)
    read, cached = shared.prompt_tokens, shared.cached_tokens
    shared.generate([Request(prompt)], Sampling(max_tokens=2))
    assert shared.cached_tokens - cached > length - 2 * vllm._CPU_BLOCK


def test_adapters_are_gone_after_use(shared: VllmEngine) -> None:
    many = [Request(PROMPTS[i % 6], adapter=loud(shared, i, "exact")) for i in range(vllm._MOST_ADAPTERS + 4)]
    replies = shared.generate(many, GREEDY)
    assert len({r[0].tokens for r in replies}) > vllm._MOST_ADAPTERS
    assert not shared.llm.llm_engine.list_loras()
    assert adapters_on_disk() == []


def test_what_a_killed_process_left_is_swept(shared: VllmEngine) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    left, ours = (vllm._memory() / f"{vllm._FOLDER}{n}-test" for n in (int(gone.stdout), os.getpid()))
    for folder in (left, ours):
        (folder / "ttsi-1").mkdir(parents=True)
    try:
        vllm._sweep()
        assert not left.exists() and ours.exists()
    finally:
        (ours / "ttsi-1").rmdir(), ours.rmdir()


def test_activated_adapters_are_refused_before_anything_is_trained(shared: VllmEngine) -> None:
    job = trainer.Job(((PROMPTS[0], "yes"),), seed=0)
    with pytest.raises(ValueError, match="activated"):
        trainer.fit(shared, [job], LoraSettings(mode="activated"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activated.*fixture"):
        load_profile("smoke", engine="vllm")
    assert load_profile("smoke", engine="vllm", mode="exact", variants={}).engine == "vllm"


def test_an_adapter_too_large_is_refused(shared: VllmEngine) -> None:
    wide = shared.lora.fresh(LoraSettings(rank=16), 0, shared.device)
    with pytest.raises(ValueError, match="rank 16"):
        shared.generate([Request(PROMPTS[0], adapter=wide)], GREEDY)


def test_training_is_the_torch_engines(shared: VllmEngine, tiny_folder: Path) -> None:
    jobs = [trainer.Job(((p, "call world"),), seed=i) for i, p in enumerate(PROMPTS[:2])]
    ours = trainer.fit(shared, jobs, LoraSettings())  # type: ignore[arg-type]
    theirs = trainer.fit(TorchEngine(tiny_folder, dtype="float32", pack=False), jobs, LoraSettings())
    assert [f[1].losses for f in ours if f] == [f[1].losses for f in theirs if f]


def test_a_vllm_that_dies_is_the_machines_failure_and_starts_again(shared: VllmEngine) -> None:
    want = tokens(shared.generate(ONE, GREEDY))
    (worker,) = children("VLLM::Worker")
    worker.send_signal(signal.SIGKILL)
    with pytest.raises(EngineError, match="vLLM failed"):
        shared.generate([Request(p, adapter=loud(shared, 1, "exact")) for p in PROMPTS], GREEDY)
    assert adapters_on_disk() == []
    assert tokens(shared.generate(ONE, GREEDY)) == want


def test_a_vllm_that_never_starts_says_so_once_and_for_all(tiny_folder: Path) -> None:
    engine = VllmEngine(tiny_folder, dtype="float32", threads=1)
    engine.context = 1 << 30  # more than the model has
    with pytest.raises(EngineError, match="could not be started"):
        engine.generate(ONE, GREEDY)
    began = time.monotonic()
    with pytest.raises(EngineError, match="could not be started"):
        engine.score(PROMPTS[:1], "x", [["y"]])
    assert time.monotonic() - began < 1


def test_adapters_that_cannot_be_written_are_the_machines_failure(
    shared: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.lora, "save", full)
    with pytest.raises(EngineError, match="No space left"):
        shared.generate([Request(PROMPTS[0], adapter=loud(shared, 1, "exact"))], GREEDY)
    assert adapters_on_disk() == []


def test_closing_leaves_no_process(tiny_folder: Path) -> None:
    before = {p.pid for p in children("VLLM::")}
    engine = VllmEngine(tiny_folder, dtype="float32", threads=1)
    engine.generate(ONE, GREEDY)
    mine = [p for p in children("VLLM::") if p.pid not in before]
    assert mine
    del engine  # as Study.release does
    _, left = psutil.wait_procs(mine, timeout=60)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []
