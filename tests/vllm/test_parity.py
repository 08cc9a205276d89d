"""vLLM against the torch engine on a real model and BFCL: scores, replies, verdicts, trained adapters.

TTSI_VLLM_MODEL names another model than SmolLM2, e.g. qwen2.5-coder-0.5b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from study.data.judge import judge
from ttsi import estimator, prompts, trainer
from ttsi.engines.base import Prompt, Request
from ttsi.engines.lora import Adapter
from ttsi.engines.torch import TorchEngine
from ttsi.engines.vllm import VllmEngine
from ttsi.types import Generation, LoraSettings, Sample, Sampling, Scored

Scorer = VllmEngine | TorchEngine
ANSWER = Sampling(max_tokens=48)
BATCH = 5


def started(folder: Path, dtype: str) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, dtype=dtype, threads=torch.get_num_threads())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def exact(model_folder: Path) -> Iterator[VllmEngine]:
    """float32; the torch engine beside it, which trains, is the reference."""
    yield from started(model_folder, "float32")


def both_scored(one: Scorer, other: Scorer, samples: Sequence[Sample]) -> Iterator[tuple[Scored, Scored]]:
    for start in range(0, len(samples), BATCH):
        queries = [s.query for s in samples[start : start + BATCH]]
        ours, theirs = (estimator.score(e, queries) for e in (one, other))
        for mine, its in zip(ours, theirs, strict=True):
            yield from zip(mine, its, strict=True)


def both_answered(
    engine: VllmEngine, samples: Sequence[Sample]
) -> Iterator[tuple[Sample, Generation, Generation]]:
    for start in range(0, len(samples), BATCH):
        group = samples[start : start + BATCH]
        requests = [Request(prompts.act(s.query), lookup=True) for s in group]
        ours, theirs = (e.generate(requests, ANSWER) for e in (engine, engine.training))
        for sample, (a,), (b,) in zip(group, ours, theirs, strict=True):
            yield sample, a, b


def per_token(pairs: Iterator[tuple[Scored, Scored]]) -> list[float]:
    """How far apart the two engines' log-probabilities (nats) are, token by token."""
    out: list[float] = []
    for a, b in pairs:
        assert (a.continuation, a.ends) == (b.continuation, b.ends)
        out += [abs(x - y) for x, y in zip(a.log_probs, b.log_probs, strict=True)]
    assert len(out) > 100
    return out


@torch.no_grad()
def gap(engine: TorchEngine, sample: Sample, a: Sequence[int], b: Sequence[int]) -> float:
    """By how much (nats) torch prefers one of the first two tokens in which the replies differ.

    From logits that are not rounded: beyond 32, where they often are, a step of bfloat16 is 0.25 by itself.
    """
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    ids = torch.tensor([[*engine.encode(prompts.act(sample.query)).ids, *a[:at]]])
    hidden = engine.forward(ids, torch.arange(ids.shape[1])[None], None, None)[:, -1]
    one, other = engine.model.get_output_embeddings().weight[[a[at], b[at]]].float() @ hidden[0].float()
    return abs(one.item() - other.item())


def test_float32_scores_are_torchs(exact: VllmEngine, samples: Sequence[Sample]) -> None:
    assert max(per_token(both_scored(exact, exact.training, samples))) <= 1e-3


def test_float32_replies_are_torchs(exact: VllmEngine, samples: Sequence[Sample]) -> None:
    rows = list(both_answered(exact, samples))
    assert [a.tokens for _, a, _ in rows] == [b.tokens for _, _, b in rows]
    for _, a, b in rows:
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-3)
        assert (a.text, a.finished, a.prompt_tokens) == (b.text, b.finished, b.prompt_tokens)
    assert len({a.text for _, a, _ in rows}) > 10


# --- adapters -------------------------------------------------------------------------------------------

REPLIES = ('[{"name": "open_door", "arguments": {}}]', "No tool is needed here, thank you.")


@pytest.fixture(scope="module")
def opposites(exact: VllmEngine, samples: Sequence[Sample]) -> tuple[Prompt, list[Adapter]]:
    """A prompt, and two adapters that were taught opposite answers to it."""
    prompt = prompts.act(samples[0].query)
    jobs = [trainer.Job(((prompt, reply),), seed=i) for i, reply in enumerate(REPLIES)]
    fitted = trainer.fit(exact, jobs, LoraSettings(epochs=12, learning_rate=2e-3))  # type: ignore[arg-type]
    return prompt, [f[0] for f in fitted if f]


def test_adapters_reach_their_own_rows(
    exact: VllmEngine, opposites: tuple[Prompt, list[Adapter]], samples: Sequence[Sample]
) -> None:
    prompt, (one, other) = opposites
    others = [prompts.act(s.query) for s in samples[1:5]]
    order = [one, None, other, one, other, None]
    requests = [Request(prompt, adapter=a) for a in order] + [Request(p) for p in others]
    texts = [r[0].text for r in exact.generate(requests, ANSWER)]
    base = [r[0].text for r in exact.training.generate([Request(p) for p in (prompt, *others)], ANSWER)]
    assert base[0] not in REPLIES
    want = [base[0] if a is None else REPLIES[a is other] for a in order]
    assert texts == [*want, *base[1:]]


def test_the_prefix_cache_mixes_no_adapters(
    exact: VllmEngine, opposites: tuple[Prompt, list[Adapter]]
) -> None:
    prompt, (one, other) = opposites
    exact.generate([Request(prompt)], ANSWER)
    for adapter in (one, other, None, one):
        request, cached = Request(prompt, adapter=adapter), exact.cached_tokens
        (reply,) = exact.generate([request], ANSWER)[0]
        (want,) = exact.training.generate([request], ANSWER)[0]
        assert reply.tokens == want.tokens
        assert reply.log_probs == pytest.approx(want.log_probs, abs=2e-3)
        assert (exact.cached_tokens > cached) == (adapter is None)  # of another's prefix nothing is used


# --- bfloat16 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(exact: VllmEngine, model_folder: Path) -> Iterator[VllmEngine]:
    exact.close()  # one at a time: memory
    yield from started(model_folder, "bfloat16")


def test_bfloat16_scores_are_as_near_to_float32_as_torchs(
    rounded: VllmEngine, samples: Sequence[Sample], model_folder: Path
) -> None:
    """How far rounding takes them depends on the processor: torch's own distance is the measure."""
    apart = per_token(both_scored(rounded, rounded.training, samples))
    whole = TorchEngine(model_folder, dtype="float32")
    ours, torchs = (per_token(both_scored(e, whole, samples)) for e in (rounded, rounded.training))
    assert np.mean(apart) <= 0.05
    assert max(apart) <= max(0.3, 2 * max(torchs))
    assert np.mean(ours) <= 1.5 * np.mean(torchs)
    assert np.quantile(ours, 0.99) <= 1.5 * np.quantile(torchs, 0.99)


def test_bfloat16_replies_differ_at_near_ties_only(rounded: VllmEngine, samples: Sequence[Sample]) -> None:
    rows = list(both_answered(rounded, samples))
    gaps = {s.id: gap(rounded.training, s, a.tokens, b.tokens) for s, a, b in rows if a.tokens != b.tokens}
    assert max(gaps.values(), default=0.0) < 0.25, gaps
    verdicts = [(judge(a.text, s), judge(b.text, s)) for s, a, b in rows]
    assert sum((a.correct, a.code) == (b.correct, b.code) for a, b in verdicts) >= 0.95 * len(rows)
