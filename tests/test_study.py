"""The study end to end with the tiny model: what a run holds, what it never repeats, what it survives."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from study.data import benchmarks
from study.run import engines, keys
from study.run.arms import ARMS, Step
from study.run.config import load_profile
from study.run.keys import Keys
from study.run.plan import plan
from study.run.store import Row
from study.run.study import Study
from ttsi import conversations, prompts
from ttsi.engines.base import EngineError
from ttsi.types import Gold, Query, Sample

TIMES = ["seconds_h", "seconds_g", "seconds_t", "seconds_answer"]
METHOD: dict[str, Any] = {
    "arms": ["base", "tt_si"],
    "inference": ["direct"],
    "variants": {},
    "estimators": {},
}
"""The method and its base line; the other arms are test_arms.py's."""


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One finished run of profile smoke, shared by the tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("runs")))
        study = Study("smoke", **METHOD)
        study.run()
        return study


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    return tmp_path


def test_a_smoke_run_holds_every_kind_of_sample(smoke_run: Study) -> None:
    rows = smoke_run.records()
    base, adapted = (rows[rows.arm == arm] for arm in ("base", "tt_si"))
    assert (rows.status == "ok").all() and rows.source.eq("computed").all()
    assert base.correct.any() and not base.correct.all()
    assert (~adapted.uncertain).any() and adapted.adapted.any() and adapted.synthesis_failed.any()
    both = adapted[adapted["mode"] == "activated"].merge(base, on="sample", suffixes=("", "_base"))
    assert (both.reply != both.reply_base)[both.adapted].any()
    # Who isn't adapted gets the base answer, to the letter.
    assert (both.reply == both.reply_base)[~both.adapted].all()


def test_records_have_one_row_per_sample_and_arm(smoke_run: Study) -> None:
    rows = smoke_run.records()
    n = len(smoke_run.samples("fixture", 0))
    counts = rows.groupby(["arm", "mode"]).size().to_dict()
    assert counts == {("base", "none"): n, ("tt_si", "activated"): n, ("tt_si", "exact"): n}
    assert not rows.duplicated(["benchmark", "sample", "seed", "arm", "mode", "inference"]).any()


def test_nothing_is_computed_twice(smoke_run: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Study(smoke_run.profile)
    again.store = smoke_run.store
    monkeypatch.setattr(Study, "engine", property(lambda _: pytest.fail("the model was loaded")))
    again.run()
    # A stricter threshold selects among what is there: whoever is uncertain at 0.3 was at 0.95.
    lower = Study(smoke_run.profile.model_copy(update={"tau": 0.3}))
    lower.store = smoke_run.store
    lower.run()
    few, many = (int(s.records(["tt_si"]).adapted.sum()) for s in (lower, again))
    assert few < many


def test_what_was_not_run_is_no_failure(runs: Path) -> None:
    study = Study("smoke", n=4, **METHOD)
    study.run(["base"])
    rows = study.records()
    assert set(rows.arm) == {"base"}
    assert (rows.status == "ok").all()


def test_a_variants_rows_name_its_own_model(runs: Path) -> None:
    variants = {"larger": {"model": "smollm2-135m"}, "half": {"dtype": "bfloat16"}, "k2": {"k": 2}}
    study = Study("smoke", **{**METHOD, "variants": variants})
    for n, part in enumerate([study, *map(study.variant, variants), study.variant("larger")]):
        part.store.put("answer", {}, "fixture", 0, [Row(f"f-{n}", "ok", "[]", 0.0, 1)])
    with sqlite3.connect(study.store.path) as db:
        made = db.execute("SELECT sample, context FROM result JOIN run ON run.id = run ORDER BY 1").fetchall()
        assert db.execute("SELECT count(*) FROM run").fetchone() == (3,)
    told = [json.loads(context) for _, context in made]
    assert [(c["model"], c["dtype"]) for c in told] == [
        ("tiny", "float32"), ("smollm2-135m", "float32"), ("tiny", "bfloat16"), ("tiny", "float32"),
        ("smollm2-135m", "float32"),
    ]  # fmt: skip
    assert len({c["machine"] for c in told}) == 1
    assert set(study.store.get("answer", {}, "fixture", 0, [f"f-{n}" for n in range(5)])) == {
        f"f-{n}" for n in range(5)
    }


def test_half_a_group_is_no_result(runs: Path) -> None:
    """Else an arm that has only begun would be judged by its certain samples, which need no computing."""
    study = Study("smoke", n=12, mode="activated", **METHOD)
    study.run(["base"])
    study.score()
    assert study.records(["tt_si"]).empty
    first = study.samples("fixture", 0)[:8]
    some = Study("smoke", n=8, mode="activated", **METHOD)
    some.store = study.store
    some.run()
    assert study.records(["tt_si"])["sample"].tolist() == [s.id for s in first]


def comparable(study: Study) -> pd.DataFrame:
    return study.records().drop(columns=TIMES)


def test_gold_reaches_neither_h_nor_g_nor_t(smoke_run: Study, runs: Path, monkeypatch: Any) -> None:
    assert "gold" not in {f.name for f in dataclasses.fields(Query)}
    poisoned = Study("smoke", n=8, **METHOD)
    poison = (Gold("poison", {"poison": ("poison",)}),)
    real = Study.samples

    def samples(self: Study, benchmark: str, seed: int) -> list[Sample]:
        return [dataclasses.replace(s, gold=poison, flags=frozenset()) for s in real(self, benchmark, seed)]

    monkeypatch.setattr(Study, "samples", samples)
    poisoned.run()
    columns = ["sample", "arm", "mode", "margin", "adapted", "synthesis_failed", "copy_ratio", "reply"]
    got = poisoned.records()
    assert not got.correct.any()
    monkeypatch.undo()
    wanted = smoke_run.records()
    wanted = wanted[wanted["sample"].isin(got["sample"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(got[columns], wanted[columns])


def test_a_failure_of_the_machine_is_no_wrong_answer(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("smoke", n=4, mode="activated", **METHOD)
    victim = study.samples("fixture", 0)[1]
    real = study.engine.generate

    def generate(requests: Any, sampling: Any) -> Any:
        if any(r.prompt.messages == victim.messages for r in requests):
            raise EngineError("out of memory: pretended")
        return real(requests, sampling)

    monkeypatch.setattr(study.engine, "generate", generate)
    study.run(["base"])
    rows = study.records(["base"]).set_index("sample")
    assert rows.status.to_dict() == {
        s.id: "error" if s is victim else "ok" for s in study.samples("fixture", 0)
    }
    assert rows.correct[victim.id] is None and "pretended" in rows.error[victim.id]
    monkeypatch.undo()
    study.run(["base"])
    assert (study.records(["base"]).status == "ok").all()


@pytest.mark.parametrize("shape", [{"batch": 1}, {"rows": 3}], ids=["one by one", "in flight"])
def test_batches_change_neither_text_nor_verdict(
    smoke_run: Study, runs: Path, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, widths = Study("smoke", n=8, mode="activated", **shape, **METHOD), list[int]()
    step = alone.engine.step

    def watched(cache: Any, rows: Any, *rest: Any) -> torch.Tensor:
        widths.append(len(rows))
        return step(cache, rows, *rest)

    monkeypatch.setattr(alone.engine, "step", watched)
    alone.run()
    assert max(widths) == shape.get("rows", 1)
    columns = ["sample", "arm", "reply", "correct", "adapted"]
    got = alone.records()
    wanted = smoke_run.records()
    wanted = wanted[wanted["sample"].isin(got["sample"]) & (wanted["mode"] != "exact")].reset_index(drop=True)
    pd.testing.assert_frame_equal(got[columns], wanted[columns])
    assert got.margin.dropna().to_numpy() == pytest.approx(wanted.margin.dropna().to_numpy(), abs=1e-3)


def test_killed_at_any_moment_a_run_resumes_to_the_same_records(
    smoke_run: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    rng = random.Random(0)
    program = f"from study.run.study import Study; Study('smoke', **{METHOD!r}).run()"
    kills = 0
    for _ in range(3):
        store = tmp_path / "smoke" / "store.sqlite"
        process = subprocess.Popen([sys.executable, "-c", program], env=os.environ, stderr=subprocess.DEVNULL)
        while process.poll() is None and not store.exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0.5, 6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    resumed = Study("smoke", **METHOD)
    resumed.run()
    pd.testing.assert_frame_equal(comparable(resumed), comparable(smoke_run))


def test_a_benchmark_that_is_missing_is_named_and_the_study_goes_on(
    smoke_run: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from study.data import sources

    real = benchmarks.load

    def load(name: str, *args: Any, **kwargs: Any) -> list[Sample]:
        if name == "sealtool":
            raise sources.Unavailable("sealtool can't be had: put sealtool.json into TTSI_DATA")
        return real(name, *args, **kwargs)

    def no_file(name: str) -> Path:
        raise sources.Unavailable(f"{name} can't be had")

    monkeypatch.setattr(benchmarks, "load", load)
    monkeypatch.setattr(sources, "benchmark_file", no_file)
    study = Study(smoke_run.profile.model_copy(update={"benchmarks": {"sealtool": 4, "fixture": None}}))
    study.store = smoke_run.store
    assert "TTSI_DATA" in plan(study)
    study.run()
    study.score()
    assert study.examples("sealtool") == {}
    assert set(study.scores().benchmark) == {"fixture"}
    assert set(study.records().benchmark) == {"fixture"} and set(study.missing) == {"sealtool"}


def test_unknown_settings_are_refused(runs: Path) -> None:
    with pytest.raises(ValueError, match="there are"):
        Study("no-such-profile")
    with pytest.raises(ValueError, match="tauu"):
        Study("smoke", tauu=1)
    with pytest.raises(ValueError, match="there are"):
        Study("smoke", n=1).run(["no-such-arm"])


def test_running_out_of_memory_in_training_is_the_machines_failure(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("smoke", n=8, mode="activated", **METHOD)

    def exhausted(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(study.engine, "training_pass", exhausted)
    study.run()
    rows = study.records(["tt_si"])
    failed = rows[rows.status == "error"]
    assert len(failed) and failed.error.str.contains("out of memory").all()
    assert failed.uncertain.all() and rows[~rows.uncertain].status.eq("ok").all()
    monkeypatch.undo()
    study.run()
    assert (study.records(["tt_si"]).status == "ok").all()


def test_too_long_is_said_once_and_not_tried_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("smoke", n=4, answer_tokens=2000, **METHOD)
    study.run(["base"])
    rows = study.records(["base"])
    assert (rows.status == "error").all() and rows.error.str.startswith("TooLong").all()
    monkeypatch.setattr(study.engine, "generate", lambda *_: pytest.fail("tried again"))
    study.run(["base"])


def test_models_are_taken_over_only_where_they_were_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_KEPT", {})
    first = Study("smoke", n=1, **METHOD)
    assert Study("smoke", n=1, **METHOD).engine is not first.engine
    engines.keep_models()
    got = [Study("smoke", n=2, **METHOD).engine, Study("smoke", n=1, dtype="bfloat16", **METHOD).engine]
    assert [e is first.engine for e in got] == [True, False]


def test_a_group_that_was_cut_is_computed_whole(runs: Path) -> None:
    few, all_of_it = Study("smoke", n=5, **METHOD), Study("smoke", n=8, **METHOD)
    few.run(["base"])
    all_of_it.store = few.store
    all_of_it.run(["base"])
    with sqlite3.connect(few.store.path) as db:
        batches = dict(db.execute("SELECT sample, batch FROM result WHERE stage = 'answer'"))
    order = [s.id for s in all_of_it.samples("fixture", 0)]
    assert [batches[i] for i in order] == [5] * 5 + [8] * 3


# --- what a result is stored under ----------------------------------------------------------------------


def test_other_words_in_a_prompt_are_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever writes them: the prompts, the reading of messages, or the reading of tools."""

    def forget() -> None:
        benchmarks._loaded.cache_clear()
        keys.prompts_hash.cache_clear()

    def key() -> str:
        forget()
        return keys.prompts_hash("fixture", 0, "shuffled", False)

    before = key()
    assert key() == before
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "tool_line", lambda tool: f"{tool.name}()")
        assert key() != before
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "_SYNTHESIS", prompts._SYNTHESIS + "!")
        assert key() != before
    with monkeypatch.context() as patch:
        patch.setitem(conversations._ROLES, "agent", "user")
        assert key() != before, "one conversation of the fixture has an agent"
    assert key() == before
    forget()
    full = load_profile("full")
    asked = {keys.prompts_of(p, "fixture", 0) for p in (full, full.under({"instructions": "Mind the gap."}))}
    assert len(asked) == 2
    assert keys.prompts_of(full, "fixture", 0) == before, "none are no words"


def test_the_key_is_the_same_for_any_n_and_differs_by_seed(runs: Path) -> None:
    few, seeds = Study("smoke", n=3, **METHOD), Study("smoke", seeds=[1], **METHOD)
    asked = [Keys(s.profile, s.dtype, "fixture", s.profile.seeds[0]).common() for s in (few, seeds)]
    whole = Study("smoke", **METHOD)
    assert asked[0] == Keys(whole.profile, whole.dtype, "fixture", 0).common()
    assert asked[0]["samples"] != asked[1]["samples"]


# --- the plan -------------------------------------------------------------------------------------------


def test_the_plan_loads_no_model_and_no_torch(tmp_path: Path) -> None:
    program = """import sys
from study.run.study import Study
from study.run.plan import plan
print(plan(Study("smoke"), details=True))
print("torch" in sys.modules)"""
    env = {**os.environ, "TTSI_RUNS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")
    for stage in ("adapted exact", "fit activated (sft)", "teacher example", "variant k2"):
        assert stage in done.stdout


def test_the_plan_of_a_finished_run_is_empty(smoke_run: Study) -> None:
    lines = plan(smoke_run, details=True).splitlines()[1:-2]
    counts = [re.findall(r" (\d+) samples, +(\d+) stored", line) for line in lines]
    assert len(lines) == 5 and all(asked == stored for ((asked, stored),) in counts)
    assert "Estimated 0 minutes" in plan(smoke_run)
    short = plan(smoke_run).splitlines()[1:-2]
    assert len(short) == 1 + len(smoke_run.profile.variants), "a benchmark, and each variant"
    ((asked, stored),) = re.findall(r" (\d+) results, +(\d+) stored", short[0])
    assert asked == stored == str(sum(int(n) for ((n, _),) in counts))
    bare = Study(smoke_run.profile.model_copy(update={"k": 3}))
    bare.store = smoke_run.store
    assert any(
        asked != stored
        for ((asked, stored),) in (
            re.findall(r" (\d+) samples, +(\d+) stored", line)
            for line in plan(bare, details=True).splitlines()[1:-2]
        )
    )


def test_a_sample_tried_alone_is_computed_alone(runs: Path) -> None:
    """What takes its process with it must not be asked again with the others of its group."""
    study = Study("smoke", **METHOD)
    group, *_ = study.work([Step("base")], "fixture", 0)
    assert len(group.samples) == study.profile.batch > 1
    study.do(dataclasses.replace(group, samples=group.samples[:1]))
    with sqlite3.connect(study.store.path) as db:
        assert db.execute("SELECT sample FROM result").fetchall() == [(group.samples[0],)]
    study.do(group)
    with sqlite3.connect(study.store.path) as db:
        assert {s for (s,) in db.execute("SELECT sample FROM result")} == set(group.samples)


# --- profiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "full", "paper"])
def test_every_profile_and_variant_can_be_read(name: str) -> None:
    profile = load_profile(name)
    assert {"base", "tt_si"} <= set(profile.arm_names) <= set(ARMS)
    for variant in profile.variants:
        assert profile.variant(variant).variants == {}


def test_arms_per_benchmark() -> None:
    profile = load_profile("full")
    assert profile.arms_of("bfcl") == profile.arms_of("toolalpaca") != profile.arms_of("apibank")
    assert "oracle" in profile.arms_of("sealtool") and "oracle" not in profile.arms_of("bfcl")
    with pytest.raises(ValueError, match="epoch"):
        load_profile("smoke", variants={"x": {"epoch": 2}})
    with pytest.raises(ValueError, match="no variant 'x'; it has k2"):
        load_profile("smoke").variant("x")
