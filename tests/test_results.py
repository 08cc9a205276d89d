"""Runs that travel: what an export holds, what it must not hold, and going on from it elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from study.data import benchmarks, sources
from study.run import redaction
from study.run.export import KEYS, export, load_into
from study.run.memory import REDACTED
from study.run.redaction import Redactor, quotations
from study.run.results import Results
from study.run.study import Study, open_study
from ttsi import filters, trainer
from ttsi.synthesizer import copy_ratio
from ttsi.types import Message, Query, Sample

SETTINGS: dict[str, Any] = {
    "arms": ["base", "tt_si", "tt_si_icl", "sft"],
    "mode": "activated",
    "inference": ["direct"],
    "n": 10,
    "sft_samples": 2,
    "variants": {"k2": {"arms": ["tt_si"], "k": 2}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished run with a variant, its estimators and embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("runs")))
        study = Study("smoke", **SETTINGS)
        for part in (study, study.variant("k2")):
            part.run()
        study.score()
        study.embed()
        return study


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(study, tmp_path_factory.mktemp("results") / "smoke")


@pytest.fixture(scope="module")
def secret(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run's export, as if the fixture were a benchmark that may not be quoted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redaction, "FREE", frozenset())
        return export(study, tmp_path_factory.mktemp("secret") / "smoke")


def read(folder: Path, **overrides: Any) -> Results:
    opened = open_study("smoke", folder, **overrides)
    assert isinstance(opened, Results)
    return opened


# --- reading --------------------------------------------------------------------------------------------


def test_the_frames_come_back_as_they_were(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [study.records(), study.variant("k2").records(), study.scores(), study.examples_frame()]
    embedded = study.embeddings_frame()
    samples = study.samples_frame()
    monkeypatch.setattr(benchmarks, "load", lambda *_, **__: pytest.fail("a benchmark was read"))
    monkeypatch.setattr(Study, "__init__", lambda *_, **__: pytest.fail("a study was opened"))
    back = read(folder)
    back.run()
    back.score()
    assert frames[0]["correct"].notna().all() and len(frames[1])
    for wanted, got in zip(
        frames,
        [back.records(), back.variant("k2").records(), back.scores(), back.examples_frame()],
        strict=True,
    ):
        assert list(got.columns) == list(wanted.columns)
        pd.testing.assert_frame_equal(got, wanted, check_dtype=False)
    assert set(embedded["kind"]) == {"seed", "synthetic"}
    np.testing.assert_array_equal(back.embeddings_frame().filter(like="pc"), embedded.filter(like="pc"))
    pd.testing.assert_frame_equal(back.samples_frame(), samples, check_dtype=False)
    assert len(read(folder, benchmarks={"fixture": None}).samples_frame()) == 40, "also of those not run"
    assert study.context["commit"] in back.header() and "nothing computed here" in back.header()


def test_the_texts_that_were_exported_are_shown(
    study: Study, folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote, twice = study.examples("fixture"), study.variant("k2").examples("fixture")
    monkeypatch.setattr(benchmarks, "load", lambda *_, **__: pytest.fail("a benchmark was read"))
    assert read(folder).examples("fixture") == wrote
    assert any(s.failed for s in wrote.values()) and not all(s.failed for s in wrote.values())
    assert read(folder).variant("k2").examples("fixture") == twice != wrote
    few = read(folder, n=3)
    assert set(few.examples("fixture")) == set(wrote) & set(few.samples_frame()["sample"])
    assert read(folder).examples("fixture", seed=1) == {} == read(folder).examples("bfcl")
    shown = read(secret).variant("k2").examples("fixture")
    assert shown.items() < twice.items(), "what was replaced by its SHA-256 is no text to show"
    assert not any(e.question.startswith("sha256:") for s in shown.values() for e in s.examples)


def test_an_export_is_small(folder: Path) -> None:
    assert (folder / "embeddings.parquet").stat().st_size < 100_000
    assert sum(p.stat().st_size for p in folder.iterdir()) < 500_000


def test_a_flipped_verdict_is_read(study: Study, folder: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(folder / "records.parquet")
    table.loc[0, "correct"] = not table.loc[0, "correct"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table.to_parquet(tmp_path / "records.parquet")
    assert (read(tmp_path).records()["correct"] != study.records()["correct"]).sum() == 1


def test_a_part_of_the_results_can_be_asked_for(study: Study, folder: Path) -> None:
    first = [s.id for s in study.samples("fixture", 0)][:3]
    few = read(folder, n=3, arms=["base", "tt_si"]).records(["base"])
    assert few["sample"].tolist() == first and set(few["arm"]) == {"base"}
    assert read(folder, benchmarks={"fixture": 3}).scores()["sample"].tolist() == first


def test_what_wants_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made with tau = 0\.95"):
        read(folder, tau=0.5)
    with pytest.raises(ValueError, match="no variant 'k3'"):
        read(folder).variant("k3")
    with pytest.raises(ValueError, match="holds no results"):
        open_study("smoke", tmp_path)


# --- going on -------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_an_export(
    study: Study, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    load_into(tmp_path / "smoke" / "store.sqlite", folder)
    elsewhere = Study("smoke", **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "engine", property(lambda _: pytest.fail("the model was loaded")))
        elsewhere.run()
        elsewhere.score()
    got = elsewhere.records()
    assert set(got["source"]) == {"loaded"}
    pd.testing.assert_frame_equal(got, study.records().assign(source="loaded"))
    more = Study("smoke", **{**SETTINGS, "n": 12, "arms": ["base"]})
    more.run()
    assert more.records()["source"].value_counts().to_dict() == {"loaded": 10, "computed": 2}


# --- what may not leave ---------------------------------------------------------------------------------


def strings(value: Any) -> list[str]:
    """Every text in a table's cell, in JSON or plain."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            return [value]
        return strings(inner) if isinstance(inner, dict | list) else [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in strings(v)]
    if isinstance(value, list | np.ndarray):
        return [t for v in value for t in strings(v)]
    return []


def test_no_question_leaves(study: Study, folder: Path, secret: Path) -> None:
    asked = {s.id: s.query.question for s in study.samples("fixture", 0)}

    def leaks(of: Path) -> int:
        found = 0
        for path in of.glob("*.parquet"):
            table = pd.read_parquet(path)
            for row in table.to_dict("records"):
                texts = [t for column in ("value", "reply") for t in strings(row.get(column))]
                found += sum(
                    copy_ratio(t, asked[row["sample"]]) >= redaction.ALIKE
                    for t in texts
                    if row["sample"] in asked
                )
        return found

    assert leaks(folder) > 0, "the search finds what may be quoted"
    assert leaks(secret) == 0
    written = pd.read_parquet(secret / "stages.parquet")
    hidden = written[written["stage"] == REDACTED + "example"]["value"].map(json.loads)
    examples = [e for v in hidden for e in v["examples"]]
    assert examples and all(len(v["examples"]) == 1 for v in hidden)
    assert all(e["question"].startswith("sha256:") and not e["calls"][0]["arguments"] for e in examples)


def test_a_redacted_example_counts_and_is_never_learnt_from(
    study: Study, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    load_into(tmp_path / "smoke" / "store.sqlite", secret)
    arms = {**SETTINGS, "arms": ["base", "tt_si"]}
    kept = Study("smoke", **arms)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *_, **__: pytest.fail("what is stored was trained again"))
        kept.run()
    wanted = study.records(["base", "tt_si"])
    columns = ["sample", "arm", "reply", "correct", "copy_ratio", "attempts", "adapted"]
    pd.testing.assert_frame_equal(kept.records()[columns], wanted[columns])
    assert (
        kept.examples_frame()["question_sha256"].tolist()
        == study.examples_frame()["question_sha256"].tolist()
    )

    learnt: list[str] = []
    fit = trainer.fit

    def watched(engine: Any, jobs: Any, *args: Any, **kwargs: Any) -> Any:
        learnt.extend(m.content for j in jobs for prompt, _ in j.examples for m in prompt.messages)
        return fit(engine, jobs, *args, **kwargs)

    monkeypatch.setattr(trainer, "fit", watched)
    other = Study("smoke", **{**arms, "arms": ["tt_si"], "epochs": 1})
    other.run()
    assert len(learnt) == other.records()["adapted"].sum() > 0
    assert not any("sha256" in text for text in learnt)
    texts = {e.question for s in study.examples("fixture").values() for e in s.examples}
    assert set(learnt) <= texts


def test_no_filter_judges_a_hash(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Redactor, "matches", lambda self, text, sample: text[-1:] in ("?", "."))
        export(study, tmp_path / "hidden")
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    load_into(tmp_path / "smoke" / "store.sqlite", tmp_path / "hidden")
    kept = Study("smoke", **{**SETTINGS, "arms": ["tt_si", "tt_si_novel"], "variants": {}})
    hidden = set(kept.records(["tt_si"]).query("uncertain")["sample"])
    assert hidden and kept.records(["tt_si_novel"]).empty, "what can't be judged is lacking"

    judged: list[str] = []
    copies = filters.copies
    monkeypatch.setattr(filters, "copies", lambda text, query: judged.append(text) or copies(text, query))
    kept.run()
    assert hidden <= set(kept.records(["tt_si_novel"])["sample"])
    assert judged and not any("sha256" in text for text in judged)


def test_quotations_and_likeness() -> None:
    asked = "Please tell me the weather in Lima for the next five days, thank you very much."
    query = Query("b-1", "b", (Message("user", asked),), ())
    redactor = Redactor("b", {"b-1": Sample(query, ())})
    assert redactor.matches("tell me the WEATHER in Lima, for the", "b-1"), "eight words in a row"
    assert not redactor.matches("tell me the weather in Lima", "b-1")
    assert redactor.matches("Please tell the weather in Lima, next five days, thanks very much.", "b-1"), (
        "alike"
    )
    assert redactor.matches("… " + asked, "another sample's reply")
    assert not redactor.matches('[{"name": "get_weather", "arguments": {"city": "Lima"}}]', "b-1")
    assert len(quotations("one two three four five six seven eight nine")) == 2


COMMITTED = sorted(p.parent for p in (Path(redaction.__file__).parents[2] / "results").glob("*/header.json"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda p: p.name)
def test_committed_results_quote_no_benchmark(folder: Path) -> None:
    texts = pd.concat(
        [
            pd.read_parquet(folder / "stages.parquet")[["benchmark", "sample", "value"]],
            pd.read_parquet(folder / "records.parquet")[["benchmark", "sample", "reply"]].rename(
                columns={"reply": "value"}
            ),
        ]
    )
    for benchmark, rows in texts.groupby("benchmark"):
        try:
            samples = {s.id: s for s in benchmarks.load(str(benchmark))}
        except sources.Unavailable as error:
            pytest.skip(str(error))
        redactor = Redactor(str(benchmark), samples)
        for sample, value in zip(rows["sample"], rows["value"], strict=True):
            assert not any(redactor.matches(text, sample) for text in strings(value)), (benchmark, sample)


def test_what_a_machine_only_loaded_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place, of its maker, and with what another machine could read of it; new rows come last."""
    settings = {"n": 4, "variants": {}, "estimators": {}, "inference": ["direct"], "mode": "activated"}
    arms, folder = ["base", "constrained"], tmp_path / "results"
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "one"))
    first = Study("smoke", **settings, arms=arms[1:])
    first.run()
    export(first, folder)
    before = pd.read_parquet(folder / "records.parquet")
    before["likelihood"] = 0.5  # as of a machine that has a tokenizer
    before.to_parquet(folder / "records.parquet")
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "two"))
    second = Study("smoke", **settings, arms=arms)
    load_into(second.store.path, folder)
    second.run()
    monkeypatch.setattr(Study, "_reads", False)
    export(second, folder, onto=True)
    after = pd.read_parquet(folder / "records.parquet")
    pd.testing.assert_frame_equal(after[:4], before, check_dtype=False)
    assert list(after["arm"]) == ["constrained"] * 4 + ["base"] * 4
    assert set(after["source"]) == {"computed"} and after["likelihood"][4:].isna().all()


def test_a_sample_has_one_margin_whichever_machine_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"n": 4, "variants": {}, "estimators": {}, "inference": ["direct"], "mode": "activated"}
    folder = tmp_path / "results"
    for machine, arm in (("one", "tt_si"), ("two", "tt_si_all")):
        monkeypatch.setenv("TTSI_RUNS", str(tmp_path / machine))
        part = Study("smoke", **settings, arms=[arm])
        part.run()
        export(part, folder, onto=True)
        records = pd.read_parquet(folder / "records.parquet")
        if machine == "one":
            records.assign(margin=records["margin"] + 1e-6).to_parquet(folder / "records.parquet")
    assert set(records["arm"]) == {"tt_si", "tt_si_all"} and len(records) == 8
    scores = pd.read_parquet(folder / "scores.parquet").set_index("sample")["margin"]
    assert (records["margin"] == records["sample"].map(scores)).all()


def test_variants_share_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read, raws, asked = [], benchmarks._raws, set()
    benchmarks._loaded.cache_clear()
    monkeypatch.setattr(benchmarks, "_raws", lambda name: read.append(name) or raws(name))
    study = Study("smoke")
    for part in (study, *map(study.variant, study.profile.variants), study.everything()):
        for benchmark in part.profile.benchmarks:
            p = part.profile
            how = {"tool_order": p.tool_order, "keep_components": p.keep_components}
            assert part.samples(benchmark, 0)[:2] == benchmarks.load(benchmark, 2, **how)
            asked.add((benchmark, *how.values()))
    assert len(read) == len(asked) > 1


def test_a_long_run_is_exported_machine_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier machine exported and this one lacks stays; what both have is this one's."""
    settings = {"n": 4, "variants": {}, "estimators": {}, "inference": ["direct"], "mode": "activated"}
    folder = tmp_path / "results"
    for machine, arms in (("one", ["base", "tt_si_icl"]), ("two", ["base", "teacher"])):
        monkeypatch.setenv("TTSI_RUNS", str(tmp_path / machine))
        part = Study("smoke", **settings, arms=arms)
        part.run()
        export(part, folder, onto=True)
    records = pd.read_parquet(folder / "records.parquet")
    assert not records.duplicated(KEYS["records"]).any()
    assert records.groupby("arm").size().to_dict() == {"base": 4, "tt_si_icl": 4, "teacher": 4}
    assert not pd.read_parquet(folder / "stages.parquet").duplicated(KEYS["stages"]).any()
    assert len(json.loads((folder / "header.json").read_text())["earlier"]) == 1
    whole = Results(folder).under(folder, {"arms": ["base", "tt_si_icl", "teacher"]})
    assert set(whole.records()["arm"]) == {"base", "tt_si_icl", "teacher"}
    other = Study("smoke", **settings | {"arms": ["base"]}, epochs=1)
    with pytest.raises(ValueError, match="made with another epochs"):
        export(other, folder, onto=True)
    header = json.loads((folder / "header.json").read_text())
    header["context"]["dtype"] = "bfloat16"
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="made in bfloat16, not float32"):
        export(part, folder, onto=True)
    header["context"]["dtype"] = "float32"
    header["profile"]["variants"] = {"k2": {"arms": ["tt_si"], "k": 2}}
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"variant k2 .* made with another k"):
        export(
            Study("smoke", **settings | {"variants": {"k2": {"arms": ["tt_si"], "k": 3}}}), folder, onto=True
        )
    export(part, folder)
    assert set(pd.read_parquet(folder / "records.parquet")["arm"]) == {"base", "teacher"}, "not asked to keep"
