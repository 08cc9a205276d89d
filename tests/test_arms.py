"""Every arm with the tiny model: what it lets happen to whom, paired with the others, nothing twice."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from study.data import benchmarks, pools
from study.data.judge import gold_calls
from study.run import arms, lessons
from study.run.arms import ARMS
from study.run.study import Study
from ttsi import trainer
from ttsi.calls import format_calls, parse_calls
from ttsi.engines.base import EngineError
from ttsi.engines.torch import TorchEngine
from ttsi.types import Call, Generation, Gold, Query, Sample

SETTINGS: dict[str, Any] = {"mode": "activated", "n": 12, "variants": {}, "estimators": {}, "votes": 5}
TIMES = ["seconds_h", "seconds_g", "seconds_t", "seconds_answer", "seconds_fit"]


@pytest.fixture(scope="module")
def counted() -> Iterator[dict[str, int]]:
    """How many adapters were trained and how many replies asked for, from the start of the module on."""
    counts = {"jobs": 0, "requests": 0}
    fit, generate = trainer.fit, TorchEngine.generate

    def counting_fit(engine: Any, jobs: Any, *args: Any, **kwargs: Any) -> Any:
        counts["jobs"] += len(jobs)
        return fit(engine, jobs, *args, **kwargs)

    def counting_generate(self: Any, requests: Any, sampling: Any) -> Any:
        counts["requests"] += len(requests)
        return generate(self, requests, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", counting_fit)
        patch.setattr(TorchEngine, "generate", counting_generate)
        yield counts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, counted: dict[str, int]) -> Study:
    """A finished run of every arm on a dozen samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("runs")))
        study = Study("smoke", **SETTINGS)
        study.run()
        return study


@pytest.fixture(scope="module")
def rows(finished: Study) -> pd.DataFrame:
    return finished.records()


def of(rows: pd.DataFrame, arm: str, inference: str = "direct", pool_n: float | None = None) -> pd.DataFrame:
    chosen = rows[(rows["arm"] == arm) & (rows["inference"] == inference)]
    if pool_n is not None:
        chosen = chosen[chosen["pool_n"] == pool_n]
    return chosen.set_index("sample")


def test_every_arm_answers_every_sample(rows: pd.DataFrame) -> None:
    assert set(rows["arm"]) == set(ARMS)
    assert (rows["status"] == "ok").all() and rows["source"].eq("computed").all()
    keys = ["benchmark", "sample", "seed", "arm", "mode", "inference", "pool_n"]
    assert not rows.duplicated(keys).any()
    assert (rows.groupby(["arm", "inference", "pool_n"], dropna=False).size() == SETTINGS["n"]).all()
    voted = set(rows[rows["inference"] != "direct"]["arm"])
    assert voted == {arm for arm, about in ARMS.items() if about.voted} == {"base", "tt_si", "tt_d"}


def test_who_is_adapted(rows: pd.DataFrame) -> None:
    adapted = {arm: set(group[group["adapted"]]["sample"]) for arm, group in rows.groupby("arm")}
    uncertain = set(of(rows, "tt_si").query("uncertain").index)
    everyone = set(rows["sample"])
    assert set() < adapted["tt_si"] <= uncertain < everyone
    assert adapted["tt_si_and_icl"] == adapted["tt_si"]
    assert set() < adapted["tt_si_certain"] <= everyone - uncertain
    assert adapted["tt_si_all"] == adapted["tt_si"] | adapted["tt_si_certain"]
    assert adapted["oracle"] == adapted["sft"] == adapted["sft_ood"] == everyone
    assert adapted["generic"] == adapted["amortised"] == uncertain
    assert adapted["donor"] <= uncertain and adapted["nearest"] <= uncertain
    likely = of(rows, "base").query("likelihood < 0.5").index
    assert adapted["tt_si_likelihood"] == adapted["tt_si_all"] & set(likely)
    assert adapted["tt_si_selective"] <= adapted["tt_si_likelihood"]
    assert adapted["tt_si_surer"] <= adapted["tt_si"]
    for arm in ("tt_si_valid", "tt_si_novel", "tt_si_agreeing", "tt_si_in_reach"):
        assert adapted[arm] <= uncertain, arm
    for arm in ("base", "tt_si_icl", "icl_nearest", "icl_random", "teacher", "self_consistency"):
        assert not adapted[arm], arm
    chosen = of(rows, "random_subset")
    assert (chosen["adapted"] | chosen["synthesis_failed"]).sum() == len(uncertain)


def test_where_arms_do_the_same_they_say_the_same(rows: pd.DataFrame) -> None:
    base, tt_si, every = of(rows, "base"), of(rows, "tt_si"), of(rows, "tt_si_all")
    for arm in (
        "tt_si",
        "tt_si_and_icl",
        "tt_si_certain",
        "random_subset",
        "donor",
        "generic",
        "amortised",
        "tt_d",
    ):
        other = of(rows, arm)
        left = other.index[~other["adapted"]]
        assert (other.loc[left, "reply"] == base.loc[left, "reply"]).all(), arm
    for arm in ("tt_si", "tt_si_certain", "random_subset"):
        both = of(rows, arm).query("adapted").index
        assert (of(rows, arm).loc[both, "reply"] == every.loc[both, "reply"]).all(), arm
    # The tiny model is its own teacher: the same prompts, the same seeds, the same examples.
    assert (of(rows, "teacher")["reply"] == base["reply"]).all()
    assert (of(rows, "tt_d")["reply"] == tt_si["reply"]).all()


def test_what_is_refused_is_no_likelier(rows: pd.DataFrame) -> None:
    """Selective arms select among the answers of `base` and `tt_si_all`: where q < ½, the likelier one."""
    base, every = of(rows, "base"), of(rows, "tt_si_all")
    surer = every["likelihood"] > base["likelihood"]
    for arm, asked in (
        ("tt_si_selective", base["likelihood"] < 0.5),
        ("tt_si_surer", every["margin"] < 0.95),
        ("tt_si_likelihood", base["likelihood"] < 0.5),
    ):
        chosen = of(rows, arm)
        stands = asked & every["adapted"] & (surer | (arm == "tt_si_likelihood"))
        assert (chosen["adapted"] == stands).all() and (chosen["uncertain"] == asked).all(), arm
        assert (chosen["reply"] == every["reply"].where(stands, base["reply"])).all(), arm
        assert (chosen["likelihood"] == every["likelihood"].where(stands, base["likelihood"])).all(), arm
        assert (chosen["refused"] == (asked & every["adapted"] & ~stands)).all(), arm
    assert of(rows, "tt_si_selective")["refused"].any() and of(rows, "tt_si_selective")["adapted"].any()
    assert of(rows, "tt_si_selective")["margin"].isna().all(), "H read the answer and scored no tool"


def test_under_a_grammar_every_finished_reply_is_a_call(finished: Study, rows: pd.DataFrame) -> None:
    tools = {
        s.id: {t.name: t.parameters.get("properties", {}) for t in s.tools}
        for s in finished.samples("fixture", 0)
    }
    seen = 0
    for arm in ("constrained", "tt_si_constrained", "tt_si_selective_constrained"):
        for sample, reply in of(rows, arm)["reply"].items():
            calls = parse_calls(reply).calls
            seen += bool(calls)
            for call in calls:
                assert set(call.arguments) <= set(tools[sample][call.name]), (arm, sample)
    assert seen > SETTINGS["n"]
    codes = set(of(rows, "constrained")["code"]) | set(of(rows, "tt_si_constrained")["code"])
    assert not codes & {"unknown_tool", "extra_argument"}
    likely = of(rows, "tt_si_constrained")
    assert set() < set(likely[likely["adapted"]].index) <= set(of(rows, "tt_si").query("uncertain").index)


def test_filters_let_pass_what_they_say(finished: Study, rows: pd.DataFrame) -> None:
    first = of(rows, "tt_si")
    for arm, column in (("tt_si_valid", "schema_valid"), ("tt_si_novel", "copy_ratio")):
        passed = of(rows, arm).query("adapted")
        assert (passed[column] == 1).all() if arm == "tt_si_valid" else (passed[column] < 1).all()
        good = first.query("adapted")[column].pipe(lambda x, a=arm: x == 1 if a == "tt_si_valid" else x < 1)
        same = good.index[good]
        assert (of(rows, arm).loc[same, "reply"] == first.loc[same, "reply"]).all(), "the first did"
    # Written anew until one passes: as many codes as were rejected.
    agreeing = of(rows, "tt_si_agreeing").query("uncertain")
    assert (agreeing["attempts"] >= first.loc[agreeing.index, "attempts"]).all()
    assert (agreeing["attempts"] > first.loc[agreeing.index, "attempts"]).any()


def test_pass_at_5_is_the_best_of_the_votes(rows: pd.DataFrame) -> None:
    for arm in ("base", "tt_si"):
        vote, best = of(rows, arm, "majority"), of(rows, arm, "pass@5")
        assert (best["correct"].astype(bool) | ~vote["correct"].astype(bool)).all()
        assert (best["n_replies"] == 5).all() and (vote["tokens_answer"] == best["tokens_answer"]).all()


def test_each_adapter_was_trained_once(finished: Study, counted: dict[str, int], rows: pd.DataFrame) -> None:
    """As many jobs as there are (sample, lesson) that an answer stands on, whatever number of arms ask it."""
    with closing(sqlite3.connect(finished.store.path)) as db:
        stored = db.execute(
            "SELECT json, sample FROM result JOIN settings ON settings = hash WHERE stage = 'adapted'"
        ).fetchall()
    asked = [(json.loads(text), sample) for text, sample in stored]
    own = {(repr(s["material"]), repr(s["lora"]), sample) for s, sample in asked}
    shared = 3 + len(finished.profile.ood_sizes)
    assert counted["jobs"] == len(own) + shared
    adapted = rows.groupby("arm")["adapted"].sum()
    assert len(own) >= adapted["tt_si_all"] + SETTINGS["n"] + adapted["donor"]
    before = dict(counted)
    again = Study(finished.profile)
    again.store = finished.store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "engine", property(lambda _: pytest.fail("the model was loaded")))
        again.run()
    assert counted == before


def test_only_the_oracle_sees_gold(
    finished: Study, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    real = Study.samples

    def samples(self: Study, benchmark: str, seed: int) -> list[Sample]:
        return [
            dataclasses.replace(s, gold=(Gold(s.tools[-1].name, {"poison": ("poison",)}),))
            for s in real(self, benchmark, seed)
        ]

    monkeypatch.setattr(Study, "samples", samples)
    poisoned = Study("smoke", **{**SETTINGS, "n": 8, "inference": ["direct"]})
    poisoned.run()
    got = poisoned.records()
    monkeypatch.undo()
    assert got[got["arm"] != "oracle"]["code"].ne("ok").all()
    local = [
        a for a, about in ARMS.items() if not about.whole
    ]  # the others draw from all the samples there are
    wanted = rows[
        rows["arm"].isin(local) & (rows["inference"] == "direct") & rows["sample"].isin(got["sample"])
    ]
    both = got[got["arm"].isin(local)].merge(wanted, on=["arm", "sample"], suffixes=("", "_true"))
    assert len(both) == 8 * len(local)
    same = both["reply"] == both["reply_true"]
    assert same[both["arm"] != "oracle"].all()
    assert not same[both["arm"] == "oracle"].all()


def test_the_oracle_learns_gold(rows: pd.DataFrame) -> None:
    assert (
        of(rows, "oracle")["correct"].astype(float).mean() > of(rows, "base")["correct"].astype(float).mean()
    )


def test_self_consistency_spends_what_tt_si_does(rows: pd.DataFrame) -> None:
    votes, spent, base = of(rows, "self_consistency"), of(rows, "tt_si"), of(rows, "base")
    budget = spent[["tokens_answer", "tokens_g", "tokens_t"]].sum(axis=1) / base["tokens_answer"]
    assert (votes["n_replies"] == np.clip(np.round(budget), 1, 10)).all()
    assert votes["n_replies"].min() == 1 and votes["n_replies"].max() > 5
    # The first five replies are those of the majority vote.
    five = votes.index[votes["n_replies"] == 5]
    assert (votes.loc[five, "reply"] == of(rows, "base", "majority").loc[five, "reply"]).all()


# --- shared adapters ------------------------------------------------------------------------------------


def test_a_shared_adapter_outlives_the_process(
    finished: Study, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    settings = {**SETTINGS, "arms": ["sft"], "inference": ["direct"]}
    first = Study("smoke", **settings)
    real = first.engine.generate

    def fails(requests: Any, sampling: Any) -> Any:
        if any(r.adapter is not None for r in requests):
            raise EngineError("out of memory: pretended")
        return real(requests, sampling)

    monkeypatch.setattr(first.engine, "generate", fails)
    first.run()
    assert (first.records()["status"] == "error").all()
    (folder,) = (tmp_path / "smoke" / "adapters").iterdir()
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}

    second = Study("smoke", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
        second.run()
    columns = ["sample", "reply", "correct", "pool_n", "tokens_fit"]
    wanted = rows[rows["arm"] == "sft"].reset_index(drop=True)
    pd.testing.assert_frame_equal(second.records()[columns], wanted[columns])

    # A file that isn't what was written is never used: here a change of one byte.
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    shutil.move(tmp_path / "smoke" / "store.sqlite", tmp_path / "store.before")
    trained = []
    fit = trainer.fit
    monkeypatch.setattr(trainer, "fit", lambda *a, **k: trained.append(1) or fit(*a, **k))
    third = Study("smoke", **settings)
    third.run()
    assert trained and (third.records()["reply"] == wanted["reply"]).all()


def test_an_adapter_serves_though_the_stored_fit_is_another_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export brings the row of a fit and not its adapter, and no machine's numbers are another's."""
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    settings = {**SETTINGS, "arms": ["sft"], "inference": ["direct"]}
    Study("smoke", **{**settings, "n": 3}).run()
    (folder,) = (tmp_path / "smoke" / "adapters").iterdir()
    theirs = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    fit = trainer.fit

    def otherwise(engine: Any, jobs: Any, *more: Any, **of: Any) -> Any:
        return fit(engine, [dataclasses.replace(job, seed=job.seed + 1) for job in jobs], *more, **of)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", otherwise)
        Study("smoke", **{**settings, "n": 6}).run()
    assert (folder / "adapter_model.safetensors").read_bytes() != theirs
    monkeypatch.setattr(trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    last = Study("smoke", **{**settings, "n": 9})
    last.run()
    assert (last.records()["status"] == "ok").all() and len(last.records()) == 9


def test_sft_that_diverges_leaves_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setattr(trainer, "fit", lambda engine, jobs, *_, **__: [None] * len(jobs))
    study = Study("smoke", **{**SETTINGS, "n": 4, "arms": ["base", "sft"], "inference": ["direct"]})
    study.run()
    rows = study.records()
    assert of(rows, "sft")["diverged"].all()
    assert (of(rows, "sft")["reply"] == of(rows, "base")["reply"]).all()


# --- pools ----------------------------------------------------------------------------------------------


def test_pools_are_nested_single_and_apart_from_the_test() -> None:
    pool = pools.load("fixture", "in", "single", 0)
    assert pool == pools.load("fixture", "in", "single", 0) and len(pool) > 100
    assert pool != pools.load("fixture", "in", "single", 1)
    assert all(len(s.gold) == 1 for s in pool)
    test = {s.query.question for s in benchmarks.load("fixture")}
    assert not test & {s.query.question for s in pool}


def test_who_has_no_pool_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for benchmark in ("apibank", "nexusraven", "toolalpaca", "bfcl"):
        with pytest.raises(pools.NoPool, match="no training split"):
            pools.name(benchmark, "in")
    assert pools.name("sealtool", "in") == "sealtool_train" and pools.name("sealtool", "out") == "bfcl"
    with pytest.raises(pools.NoPool, match="out-of-domain"):
        pools.name("bfcl", "out")
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setattr(pools, "IN_DOMAIN", {})
    study = Study("smoke", arms=["sft", "icl_nearest"], n=2)
    study.run()
    assert study.records().empty
    assert study.lacking == {("fixture", arm): "no training split" for arm in ("sft", "icl_nearest")}


def test_the_nearest_shot_is_the_one_with_the_same_words() -> None:
    pool = pools.load("fixture", "in", "single", 0)
    for wanted in (pool[0], pool[50]):
        query = dataclasses.replace(wanted.query, id="asked")
        assert pools.nearest([query], pool)["asked"].query.question == wanted.query.question


def test_a_pools_lesson_is_its_gold_call() -> None:
    sample = pools.load("fixture", "in", "single", 0)[0]
    worked = pools.worked(sample)
    assert worked.reply == format_calls(gold_calls(sample))
    assert parse_calls(worked.reply).calls == gold_calls(sample)


# --- votes ----------------------------------------------------------------------------------------------


def reply(text: str) -> Generation:
    return Generation(text, (1,), (-0.1,), True)


def test_majority_by_hand() -> None:
    a, b = (format_calls([Call("f", {"x": x})]) for x in (1, 2))
    assert arms.majority([reply(t) for t in (a, b, b)]).text == b
    assert arms.majority([reply(t) for t in ("?", b, a)]).text == b, "first seen on a tie"
    assert arms.majority([reply(t) for t in ("?", "?", a)]).text == a, "what can't be parsed has no vote"
    assert arms.majority([reply(t) for t in ("?", "!")]).text == "?"
    assert arms.vote_keys([reply("?"), reply(a)])[0] is None


def test_the_donor_is_the_next_with_other_tools(finished: Study) -> None:
    queries: list[Query] = [s.query for s in finished.samples("fixture", 0)]
    names = [{t.name for t in q.tools} for q in queries]
    for i, query in enumerate(queries):
        donor = lessons.next_with_other_tools(query, queries, queries)
        assert donor is not None and {t.name for t in donor.tools} != names[i]
        between = [*range(i + 1, len(queries)), *range(i)]
        first = next(j for j in between if names[j] != names[i])
        assert donor.id == queries[first].id
