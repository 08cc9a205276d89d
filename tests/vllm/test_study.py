"""Whole studies on vLLM: the tiny model through every way to adapt, SmolLM2 against the torch engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from study.data import sources
from study.run.study import Study
from ttsi.engines import vllm


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    before = set(vllm._memory().glob(f"{vllm._FOLDER}*"))
    yield tmp_path
    assert set(vllm._memory().glob(f"{vllm._FOLDER}*")) <= before


def run(profile: str, **settings: Any) -> Study:
    study = Study(profile, **settings)
    study.run()
    study.score()
    return study


def margins(rows: pd.DataFrame) -> dict[str, float]:
    """H's margins by sample, of those with two tools or more; base answers carry none."""
    found = rows[(rows.arm == "tt_si") & (rows.inference == "direct")].set_index("sample").margin.dropna()
    assert len(found) > 0
    return {str(sample): float(margin) for sample, margin in found.items()}


def fingerprint(engine: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(engine.model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def test_the_tiny_model_through_every_way_to_adapt(runs: Path) -> None:
    settings: dict[str, Any] = {
        "arms": ["base", "tt_si", "tt_si_icl", "tt_si_and_icl", "oracle", "sft_ood", "self_consistency"],
        "inference": ["direct", "majority"],
        "mode": "exact",
        "n": 16,
        "ood_sizes": [2],
        "variants": {},
        "batch": 8,
    }
    ours = run("smoke", engine="vllm", **settings)
    before, rows = fingerprint(ours.engine.training), ours.records()
    theirs = run("smoke", **settings).records()
    assert (rows.status == "ok").all() and rows.source.eq("computed").all()
    assert set(rows.arm) == set(settings["arms"])
    adapted = rows[rows.adapted]
    assert {"tt_si", "tt_si_and_icl"} <= set(adapted.arm) and set(adapted["mode"]) == {"exact"}
    base, reference = (t[(t.arm == "base") & (t.inference == "direct")] for t in (rows, theirs))
    assert base.reply.tolist() == reference.reply.tolist()
    assert margins(rows) == pytest.approx(margins(theirs), abs=1e-3)
    assert base.correct.any() and not base.correct.all()
    # Not the same rows under another name: who computed them is part of what they are kept by.
    assert theirs.source.eq("computed").all()
    assert fingerprint(ours.engine.training) == before
    again = Study(ours.profile)
    assert again.records().reply.tolist() == rows.reply.tolist()
    ours.engine.close()


def test_a_real_model_answers_as_under_torch(runs: Path) -> None:
    try:
        sources.model_dir("smollm2-135m")
    except sources.Unavailable as error:
        pytest.skip(str(error))
    settings: dict[str, Any] = {
        "model": "smollm2-135m",
        "dtype": "float32",
        "benchmarks": {"bfcl": 3},
        "arms": ["base", "tt_si"],
        "inference": ["direct"],
        "mode": "exact",
        "variants": {},
        "estimators": {},
        "batch": 3,
        "tau": 1.0,
    }
    ours = run("smoke", engine="vllm", **settings)
    rows = ours.records()
    theirs = run("smoke", **settings).records()
    assert len(rows) == 6 and (rows.status == "ok").all()
    base, reference = (t[t.arm == "base"] for t in (rows, theirs))
    assert base.reply.tolist() == reference.reply.tolist()
    assert base.code.tolist() == reference.code.tolist()
    assert margins(rows) == pytest.approx(margins(theirs), abs=1e-3)
    assert rows[rows.arm == "tt_si"].uncertain.any()
    assert fingerprint(ours.engine.training) == fingerprint(run("smoke", **settings).engine)
    ours.engine.close()
