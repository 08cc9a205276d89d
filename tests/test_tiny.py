"""The fixture and the model fitted on it: they must give a smoke run every kind of sample there is."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from study.data import benchmarks, fixture, tiny
from study.data.judge import gold_calls, judge
from study.data.models import model_dir
from study.run.config import load_profile
from ttsi import estimator, prompts, synthesizer
from ttsi.calls import format_calls
from ttsi.declared import schema_errors
from ttsi.engines.base import Request
from ttsi.engines.torch import TorchEngine
from ttsi.seeds import seed_for
from ttsi.trainer import Job, train
from ttsi.types import LoraSettings, Sample, Sampling


@pytest.fixture(scope="module")
def fitted() -> TorchEngine:
    return TorchEngine(model_dir("tiny"), dtype="float32", threads=1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return benchmarks.load("fixture")


def replies(engine: TorchEngine, samples: list[Sample]) -> list[str]:
    requests = [Request(prompts.act(s.query)) for s in samples]
    return [r.text for (r,) in engine.generate(requests, Sampling(max_tokens=64))]


# --- the fixture ----------------------------------------------------------------------------------------


def test_splits_have_their_sizes_and_share_no_question() -> None:
    test, train_pool = fixture.records("test"), fixture.records("train")
    assert (len(test), len(train_pool)) == (40, 200)
    questions = [fixture.question(r) for r in (*test, *train_pool)]
    assert len(set(questions)) == len(questions)
    assert test == fixture.records("test")


def test_the_test_split_has_every_form_of_record() -> None:
    records = fixture.records("test")
    assert sorted({len(r["tools"]) for r in records}) == [1, 2, 3, 4]
    assert sum(len(r["answers"]) == 2 for r in records) == 1
    assert sum(isinstance(r["query"], list) for r in records) == 1
    assert {t["name"] for r in records for t in r["tools"]} == {
        t["name"] for t in map(fixture.tool, _names())
    }


def _names() -> list[str]:
    return sorted({n for k in fixture.KINDS for n in k.tools})


def test_requests_that_fit_two_tools_are_answered_both_ways() -> None:
    kinds = [k for k in fixture.KINDS if k.ambiguous]
    pool = fixture.records("train")
    for kind in kinds:
        start = kind.wordings[0].split("{")[0]
        called = {r["answers"][0]["name"] for r in pool if r["query"].startswith(start)}
        assert called == set(kind.tools)


@pytest.mark.parametrize("name", ["fixture", "fixture_train"])
def test_gold_is_sound_and_the_judge_takes_it(name: str) -> None:
    for sample in benchmarks.load(name):
        assert not sample.flags
        assert judge(format_calls(gold_calls(sample)), sample).correct
        assert not [e for c in gold_calls(sample) for e in schema_errors(c, sample.tools)]
        values = [str(v) for c in gold_calls(sample) for v in c.arguments.values()]
        assert all(v in sample.query.question for v in values)


def test_the_fixture_needs_no_torch() -> None:
    code = "import sys, study.data.fixture as f; f.records('test'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- how the model is made ------------------------------------------------------------------------------


def test_no_test_question_is_taught(samples: list[Sample]) -> None:
    answers, examples = tiny.lessons(0)
    taught = {p.messages[-1].content for p, _ in answers}
    asked = {s.query.question for s in samples}
    assert not taught & asked
    assert not [q for q in asked for p, reply in examples if q in p.messages[0].content or q in reply]
    torn = [reply for _, reply in examples if prompts.ANSWER not in reply]
    assert 0 < len(torn) < len(examples) / 2


def test_fitting_is_deterministic_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "_STEPS", 4)
    monkeypatch.setattr(tiny, "_SAMPLES", 60)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny.build(tmp_path / name, seed=seed)
        torch.rand(1)  # what else the process draws must not matter
        found.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
        torch.set_rng_state(state)
    assert found[0] == found[1] != found[2]
    assert torch.get_num_threads() == threads
    tiny.build(tmp_path / "last")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_used_checked_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setenv("TTSI_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny, "build", build)
    folder = model_dir("tiny")
    assert model_dir("tiny") == folder
    assert len(built) == 1
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert (model_dir("tiny") / "model.safetensors").read_bytes() == b"weights"
    (folder / "config.json").unlink()
    assert (model_dir("tiny") / "config.json").exists()
    assert len(built) == 3
    monkeypatch.setattr(prompts, "version", lambda: "another wording")
    assert model_dir("tiny") != folder


def test_the_tokenizer_survives_saving(fitted: TorchEngine, samples: list[Sample]) -> None:
    """transformers rebuilds the tokenizers of some model types by their own rules (Qwen2's, for one)."""
    answers, _ = tiny.lessons(0)
    fresh = tiny.tokenizer([p.system for p, _ in answers[:50]])
    loaded = AutoTokenizer.from_pretrained(model_dir("tiny"))
    assert str(loaded._tokenizer.pre_tokenizer) == str(fresh._tokenizer.pre_tokenizer)
    lengths = [len(fitted.encode(prompts.act(s.query)).ids) for s in samples]
    assert min(lengths) > 100
    assert max(lengths) < 350


# --- what the model does --------------------------------------------------------------------------------


def test_it_is_right_and_wrong_certain_and_torn(fitted: TorchEngine, samples: list[Sample]) -> None:
    verdicts = [judge(text, s) for text, s in zip(replies(fitted, samples), samples, strict=True)]
    assert 0.2 < sum(v.correct for v in verdicts) / len(verdicts) < 0.9
    assert len({v.code for v in verdicts}) >= 3
    margins = [estimator.estimate(fitted, s.query).margin for s in samples]
    assert 5 < sum(m < 0.95 for m in margins) < 35
    assert sum(m < 0.5 for m in margins) >= 3
    # Unsure of what fits two tools, sure of what fits one: the margin means something here.
    torn = [m for m, s in zip(margins, samples, strict=True) if _ambiguous(s)]
    plain = [m for m, s in zip(margins, samples, strict=True) if not _ambiguous(s)]
    assert sum(torn) / len(torn) < sum(plain) / len(plain) - 0.2


def _ambiguous(sample: Sample) -> bool:
    starts = tuple(w.split("{")[0] for k in fixture.KINDS if k.ambiguous for w in k.wordings)
    return sample.query.question.startswith(starts)


@pytest.mark.parametrize("mode", ["exact", "activated"])
def test_it_adapts_fails_to_write_and_changes_its_mind(
    fitted: TorchEngine, samples: list[Sample], mode: str
) -> None:
    profile = load_profile("smoke")
    torn = [s for s in samples if estimator.estimate(fitted, s.query).margin < profile.tau]
    sampling = dataclasses.replace(profile.synthesis_sampling, max_tokens=96)
    written = synthesizer.synthesize(
        fitted, [s.query for s in torn], lambda i, a: seed_for(0, "fixture", i, "g", a), sampling, retries=1
    )
    assert 0 < sum(w.failed for w in written) < len(written)
    adapted = [(s, w.examples[0]) for s, w in zip(torn, written, strict=True) if not w.failed]
    settings = LoraSettings(learning_rate=0.01, mode=mode)  # type: ignore[arg-type]
    changed = 0
    for (sample, example), before in zip(adapted, replies(fitted, [s for s, _ in adapted]), strict=True):
        lesson = (prompts.example(sample.tools, example.question), format_calls(example.calls))
        ((adapter, fit),) = train(fitted, [Job((lesson,), seed=0)], settings)
        assert fit.losses[-1] < fit.losses[0]
        request = Request(prompts.act(sample.query), adapter=adapter)
        changed += fitted.generate([request], Sampling(max_tokens=64))[0][0].text != before
    assert 0 < changed < len(adapted)
