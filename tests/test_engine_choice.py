"""Which engine a profile asks for: said in the plan, refused where it can't serve, no model started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from study.run.config import load_profile
from study.run.study import Study

EXACT = {"engine": "vllm", "mode": "exact", "variants": {}}


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "vllm"},
        {**EXACT, "mode": "activated"},
        {**EXACT, "variants": {"other": {"mode": "activated"}}},
    ],
)
def test_vllm_refuses_activated_adapters_with_the_profile(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"vllm has no activated adapters.*fixture"):
        load_profile("smoke", **settings)
    assert load_profile("smoke", **EXACT).engine == "vllm"


def test_without_vllm_one_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "ttsi.engines.vllm", raising=False)
    with pytest.raises(ValueError, match="make test-vllm"):
        Study("smoke", n=1, **EXACT).run(["base"])


def test_who_computes_is_part_of_what_results_are_kept_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    Study("smoke", n=2, arms=["base"], inference=["direct"], variants={}, mode="exact").run()
    ours, theirs = (
        Study("smoke", n=2, arms=["base"], inference=["direct"], **{**EXACT, "engine": engine}).records()
        for engine in ("torch", "vllm")
    )
    assert len(ours) == 2 and len(theirs) == 0


def test_the_plan_of_the_paper_starts_no_model(tmp_path: Path) -> None:
    program = """
import sys
from study.run.study import Study
from study.run.plan import plan
print(plan(Study("paper", n=2, benchmarks=["fixture"], arms=["base", "tt_si", "tt_d"])))
print({"torch", "vllm"} & set(sys.modules))"""
    env = {**os.environ, "TTSI_RUNS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    first, *_, estimate, _, modules = done.stdout.splitlines()
    for word in (
        "engine vllm",
        "qwen2.5-1.5b",
        "teacher qwen2.5-7b",
        "base, tt_si, tt_d",
        "fixture 2",
        "[0, 1, 2, 3, 4]",
    ):
        assert word in first
    assert "GPU-hours" in estimate
    assert modules == "set()"
