"""A real model, fetched as a user's machine would: SmolLM2-135M through H, G and T."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from study.data import benchmarks, sources
from ttsi import estimator, prompts, synthesizer, trainer
from ttsi.engines.base import Request
from ttsi.engines.chat import Chat
from ttsi.engines.torch import TorchEngine
from ttsi.types import PAPER_SAMPLING, Example, LoraSettings, Sampling


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    try:
        folder: Path = sources.model_dir("smollm2-135m")
    except sources.Unavailable as error:
        pytest.skip(str(error))
    return TorchEngine(folder, dtype="float32")


def short(n: int) -> list[benchmarks.Sample]:
    """BFCL's n shortest prompts of two to six tools."""
    several = (s for s in benchmarks.load("bfcl", 300) if 2 <= len(s.tools) <= 6)
    return sorted(several, key=lambda s: len(prompts.system(s.tools)))[:n]


@pytest.fixture(scope="module")
def samples() -> list[benchmarks.Sample]:
    try:
        return short(4)
    except sources.Unavailable as error:
        pytest.skip(str(error))


def test_the_whole_method(engine: TorchEngine, samples: list[benchmarks.Sample]) -> None:
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    queries = [s.query for s in samples]
    margins = [estimator.estimate(engine, q).margin for q in queries]
    assert all(0 <= m <= 1 for m in margins) and len(set(margins)) > 1
    query = min(queries, key=lambda q: len(prompts.system(q.tools)))
    short = dataclasses.replace(PAPER_SAMPLING, max_tokens=64)
    written = synthesizer.synthesize(engine, [query], lambda s, a: a, short, retries=0)
    # A 135M model may well write nothing of use; T is then shown on an example of our own.
    examples = written[0].examples or (Example("A plain question", (), 0.0),)
    base = engine.generate([Request(prompts.act(query), lookup=True)], Sampling(max_tokens=48))[0][0]
    for mode in ("exact", "activated"):
        settings = LoraSettings(mode=mode, learning_rate=1e-3)  # type: ignore[arg-type]
        fitted = trainer.fit(engine, [trainer.job(query.tools, examples, 0)], settings)[0]
        assert fitted is not None and fitted[1].losses[-1] < fitted[1].losses[0]
        request = Request(prompts.act(query), adapter=fitted[0], draft=base.tokens)
        adapted = engine.generate([request], Sampling(max_tokens=48))[0][0]
        assert adapted.log_probs[0] != base.log_probs[0]
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())


def test_ids_equal_those_of_the_whole_string(engine: TorchEngine, samples: Any) -> None:
    for sample in samples:
        prompt = prompts.act(sample.query)
        for tool in sample.tools:
            text = estimator.continuation(tool.name)
            ids = [*engine.encode(prompt).ids, *engine.chat.continuation(prompts.OPENING, text)[0]]
            whole = engine.chat.render(prompt) + prompts.OPENING + text
            assert ids == engine.chat.tokenizer.encode(whole, add_special_tokens=False)


CONVERSATION = {
    "query": [
        {"role": "user", "content": "Please wake me, I am tired."},
        {"role": "agent", "content": "At what time would you like to get up?"},
        {"role": "assistant", "content": '```\n[{"name": "clock", "arguments": {"zone": "CET"}}]\n```'},
        {"role": "tool", "content": '{"now": "23:10"}'},
        {"role": "agent", "content": "It is ten past eleven in the evening."},
        {"role": "user", "content": "Then at seven sharp."},
        {"role": "agent", "content": "I shall set it for seven.\nGenerate API Request:"},
    ],
    "tools": [{"name": "clock", "description": "Time now", "parameters": {"zone": {"type": "str"}}}],
    "answers": [{"name": "clock", "arguments": {"zone": "CET"}}],
}


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_every_turn_of_a_conversation_reaches_the_model(model: str, engine: TorchEngine) -> None:
    # Real chat templates drop roles they don't know without a word.
    chat = engine.chat
    if model != "smollm2-135m":
        if not (sources.cache_dir() / "models" / model).exists():
            pytest.skip(f"{model} is not in the cache; `make fetch` brings it")
        chat = Chat(AutoTokenizer.from_pretrained(sources.model_dir(model)))
    query = benchmarks.to_sample(CONVERSATION, "apibank", 0).query
    seen = chat.tokenizer.decode(chat.encode(prompts.act(query)).ids)
    at = 0
    for message in query.messages:
        assert message.content in seen[at:], message.role
        at = seen.index(message.content, at) + len(message.content)
    assert "Generate API Request:" not in seen
    assert seen.rstrip().endswith("<|im_start|>assistant")
    assert seen.count("I shall set it for seven.") == seen.count("ten past eleven") == 1
    assert '<tool_call>[{"name": "clock"' in seen


def closing_tokens(engine: TorchEngine) -> list[float]:
    """Log-probability (nats) of the top candidate's last scored token, on 20 BFCL samples."""
    queries = [s.query for s in short(20)]
    out = []
    for query in queries:
        scored = estimator.score(engine, [query])[0]
        log_probs = estimator.uncertainty(scored, query.tools).log_probs
        best = max(range(len(scored)), key=log_probs.__getitem__)
        quote = len(json.dumps(query.tools[best].name)) - 1
        last = next(i for i, end in enumerate(scored[best].ends) if end >= quote)
        out.append(scored[best].log_probs[last])
    assert len(out) == 20
    return out


def test_the_last_scored_token_is_one_the_model_writes(engine: TorchEngine, samples: Any) -> None:
    # A bare quote behind the name would stand near -9; what is scored must not be noise.
    tokens = closing_tokens(engine)
    assert sum(t > -1 for t in tokens) >= 16
    assert min(tokens) > -4


def test_the_same_for_the_default_model_where_it_is_cached(samples: Any) -> None:
    folder = sources.cache_dir() / "models" / "qwen2.5-coder-0.5b"
    if not folder.exists():
        pytest.skip(
            "the 0.5 GB default model is not in the cache; `make reproduce` or `make fetch` brings it"
        )
    tokens = closing_tokens(TorchEngine(sources.model_dir("qwen2.5-coder-0.5b"), dtype="float32"))
    assert min(tokens) > -1


def test_drafts_do_not_change_the_text(engine: TorchEngine, samples: list[benchmarks.Sample]) -> None:
    requests = [Request(prompts.act(s.query), lookup=True) for s in samples]
    drafted = engine.generate(requests, Sampling(max_tokens=48))
    engine.drafts = False
    try:
        plain = [engine.generate([r], Sampling(max_tokens=48))[0] for r in requests]
    finally:
        engine.drafts = True
    assert [r[0].text for r in drafted] == [r[0].text for r in plain]
