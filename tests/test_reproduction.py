"""A random part of a committed run, computed anew: it agrees, and what doesn't is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from study import notebooks
from study.analysis import reproduction as compared
from study.analysis.reproduction import Frames
from study.data import sources
from study.run import redaction, reproduction
from study.run.arms import SCORES
from study.run.export import export
from study.run.frames import hidden
from study.run.reproduction import Cell, Part, both, doubts, read, recompute
from study.run.study import Study

SETTINGS: dict[str, Any] = {
    "arms": ["base", "tt_si", "tt_si_and_icl", "icl_nearest", "donor", "sft", "teacher"],
    "mode": "activated",
    "inference": ["direct"],
    "n": 10,
    "sft_samples": 2,
    "variants": {"k2": {"arms": ["tt_si"], "k": 2}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished run with a variant and its estimators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("runs")))
        study = Study("smoke", **SETTINGS)
        for part in (study, study.variant("k2")):
            part.run()
        study.score()
        return study


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, as if the fixture were a benchmark that may not be quoted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redaction, "FREE", frozenset())
        return export(study, tmp_path_factory.mktemp("results") / "smoke")


@pytest.fixture(scope="module")
def here(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it that can be recomputed in part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSI_RUNS", str(tmp_path_factory.mktemp("elsewhere")))
        return recompute(folder, 10)


@pytest.fixture
def frames(folder: Path, here: Path) -> tuple[Frames, Frames]:
    return both(folder, here)


def problems(committed: Frames, here: Frames) -> list[str]:
    return compared.problems(committed, here, compared.pair(committed, here))


# --- what is recomputed ---------------------------------------------------------------------------------


def test_another_computation_agrees(frames: tuple[Frames, Frames], folder: Path, here: Path) -> None:
    """In other groups than the committed run's: in float32 they don't matter."""
    committed, new = frames
    pairs = compared.pair(*frames)
    table = compared.table(*frames, pairs)
    arms = table[table["machine_here"].notna() & table["mode"].notna()].set_index(["variant", "arm"])
    whole = arms.drop(index=("", "donor"))
    assert len(whole) == 7
    assert (whole["n"] == 10).all() and (whole["n"] == whole["committed"]).all()
    assert (whole["same_reply"] == 10).all() and (whole["same_verdict"] == 100).all()
    assert (whole["accuracy"] == whole["accuracy_committed"]).all() and (whole["difference"] == 0).all()
    assert arms.loc[("", "donor"), "n"] == 0
    assert arms.loc[("", "donor"), "note"] == reproduction.NEEDS_ALL
    stages = table[table["stage"].notna()].set_index("stage")
    assert {"answer", "score", "whole", "example", "adapted activated", "shared activated"} <= set(
        stages.index
    )
    assert (stages["same_reply"].dropna() == stages["n"][stages["same_reply"].notna()]).all()
    assert stages.loc["adapted activated", "loss"] < 1e-3 and stages["log_prob"].max() < 1e-3
    assert (committed.stages["stage"] == "redacted example").any(), "compared by their hash"
    hashed = committed.records.assign(reply=committed.records["reply"].map(hidden))
    assert compared.pair(committed._replace(records=hashed), new).answers["same_reply"].all()
    assert table.loc[table["arm"] == "H", "margin"].max() < 1e-3
    assert not len(compared.differing(pairs.answers)) and doubts(folder, here) == []
    assert set(new.records["source"]) == {"computed"}, "nothing of the committed run was read"


def test_the_same_seed_draws_the_same_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))

    def drawn(draw: int) -> list[list[str]]:
        part = Part(Study("smoke", **SETTINGS).profile)
        part.draw = draw
        return [[s.id for s in p.samples("fixture", 0)] for p in (part, part.variant("k2"))]

    first, own = drawn(0), [s.id for s in Study("smoke", **SETTINGS).samples("fixture", 0)]
    assert first == drawn(0) and first[0] == first[1], "whatever the arm or the model"
    assert sorted(first[0]) == sorted(own) == sorted(drawn(1)[0])
    assert first[0] != own and first != drawn(1)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_rounds_hold_every_sample_once(n: int, batch: int) -> None:
    ids = tuple(map(str, range(n)))
    rounds = list(Cell("fixture", 0, SCORES, ids, 0.0).rounds(batch))
    assert tuple(i for part in rounds for i in part) == ids
    assert all(1 <= len(part) <= batch for part in rounds)
    assert not n or len(rounds[0]) == 1, "of everything one sample first"


def test_without_a_minute_nothing_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setattr(Part, "_load", lambda *_: pytest.fail("a model was loaded"))
    made = recompute(folder, 0)
    assert [len(table) for table in read(made)[:3]] == [0, 0, 0]
    (problem,) = doubts(folder, made)
    assert "nothing was compared" in problem


def test_what_would_take_longer_than_is_left_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    slow = shutil.copytree(folder, tmp_path / "slow")
    records = pd.read_parquet(slow / "records.parquet")
    records["seconds_fit"] = records["seconds_fit"].where(records["arm"] != "sft", 1e6)
    records[records["arm"].isin(["base", "sft"])].to_parquet(slow / "records.parquet")
    made = both(slow, recompute(slow, 10))
    assert set(made[1].records["arm"]) == {"base"}
    table = compared.table(*made, compared.pair(*made)).set_index("arm")
    assert table.loc["sft", "note"] == "not reached in the minutes"


def test_a_benchmark_that_cannot_be_had_is_marked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise sources.Unavailable("fixture can't be had: no way to it")

    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setattr("study.run.study.benchmarks.load", gone)
    made = both(folder, recompute(folder, 10))
    table = compared.table(*made, compared.pair(*made))
    assert len(table) == 8 and (table["n"] == 0).all() and (table["committed"] == 10).all()
    assert set(table["note"]) == {"fixture can't be had: no way to it"}


def test_a_model_that_cannot_be_had_is_marked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    monkeypatch.setattr(reproduction, "TINY", "another")
    monkeypatch.setattr(sources, "fetch", lambda names: {name: f"{name} is out of reach" for name in names})
    made = both(folder, recompute(folder, 10))
    table = compared.table(*made, compared.pair(*made)).set_index("arm")
    assert table.loc["base", "note"] == "tiny is out of reach" and not len(made[1].records)


# --- what doesn't agree ---------------------------------------------------------------------------------


def damaged(committed: Frames, arm: str, **cells: Any) -> tuple[Frames, str]:
    """The frames with other cells in an answer of an arm, and that answer's sample."""
    records = committed.records.copy()
    row = records.index[(records["arm"] == arm) & (records["variant"] == "")][0]
    for column, value in cells.items():
        records.loc[row, column] = value if column != "correct" else not records.loc[row, "correct"]
    return committed._replace(records=records), records.loc[row, "sample"]


def behind(committed: Frames, here: Frames, sample: str, gap: float) -> Frames:
    """The frames with another first token in the stage result behind base's answer, `gap` nats off."""
    (settings,) = here.records.loc[
        (here.records["arm"] == "base") & (here.records["sample"] == sample), "settings"
    ]
    stages = committed.stages.copy()
    is_it = (stages["stage"] == "answer") & (stages["settings"] == settings) & (stages["sample"] == sample)
    (row,) = stages.index[is_it]
    (reply,) = json.loads(stages.loc[row, "value"])
    reply |= {"text": "another", "tokens": [0, *reply["tokens"][1:]]}
    reply["log_probs"][0] += gap
    stages.loc[row, "value"] = json.dumps([reply])
    return committed._replace(stages=stages)


def test_another_verdict_on_the_same_reply_is_named(frames: tuple[Frames, Frames]) -> None:
    committed, sample = damaged(frames[0], "tt_si", correct=None)
    (problem,) = problems(committed, frames[1])
    assert problem.endswith(f"the same reply gets another verdict: {sample}")
    (row,) = compared.differing(compared.pair(committed, frames[1]).answers).to_dict("records")
    assert (row["sample"], row["arm"], row["why"]) == (sample, "tt_si", compared.JUDGED)
    committed, sample = damaged(frames[0], "base", code="made_up")
    (row,) = compared.differing(compared.pair(committed, frames[1]).answers).to_dict("records")
    assert (row["sample"], row["code"]) == (sample, "made_up") and row["code_here"] != "made_up"


def test_another_reply_is_explained_by_a_near_tie_only(frames: tuple[Frames, Frames]) -> None:
    committed, sample = damaged(frames[0], "base", reply="another")
    (problem,) = problems(committed, frames[1])
    assert compared.BEYOND[compared.CONTRADICTS] in problem and sample in problem
    (problem,) = problems(behind(committed, frames[1], sample, 0.5), frames[1])
    assert compared.BEYOND[compared.SURE] in problem and sample in problem
    tie = behind(committed, frames[1], sample, 1e-4)
    assert problems(tie, frames[1]) == []
    (row,) = compared.differing(compared.pair(tie, frames[1]).answers).to_dict("records")
    assert row["why"].startswith("near-tie")
    half = frames[1].about | {"context": frames[1].about["context"] | {"dtype": "bfloat16"}}
    assert problems(behind(committed, frames[1], sample, 0.5), frames[1]._replace(about=half)) == []


def test_too_many_other_verdicts_after_training_are_too_many(frames: tuple[Frames, Frames]) -> None:
    records = frames[0].records.copy()
    trained = (records["arm"].isin(["tt_si", "tt_si_and_icl", "sft"])) & (records["variant"] == "")
    records.loc[trained, "reply"] = "another"
    assert problems(frames[0]._replace(records=records), frames[1]) == [], "the verdicts are the same"
    records.loc[trained, "correct"] = ~records.loc[trained, "correct"].astype(bool)
    (problem,) = problems(frames[0]._replace(records=records), frames[1])
    assert "Wilson's upper end is below 99 %" in problem


@pytest.mark.parametrize("key", ["model", "data", "prompts", "samples"])
def test_what_was_made_with_something_else_is_named(frames: tuple[Frames, Frames], key: str) -> None:
    texts = [json.dumps(json.loads(t) | {key: "of old"}) for t in frames[0].stages["settings"]]
    found = problems(frames[0]._replace(stages=frames[0].stages.assign(settings=texts)), frames[1])
    said = "weights, their hash being {'of old'}" if key == "model" else f"{key}: fixture"
    assert found == [f"the committed results were made with other {said}"]


def test_an_answer_that_cannot_be_computed_is_named(frames: tuple[Frames, Frames]) -> None:
    records = frames[1].records.copy()
    records.loc[0, ["status", "error"]] = ["error", "OutOfMemory: no room"]
    (problem,) = problems(frames[0], frames[1]._replace(records=records))
    assert problem == "1 answers can't be computed on this machine: OutOfMemory: no room"


def test_all_machines_are_named(frames: tuple[Frames, Frames]) -> None:
    before = frames[0].about["context"] | {"machine": "an earlier one"}
    committed = frames[0]._replace(about=frames[0].about | {"earlier": [before]})
    one, other = (f.about["context"]["machine"] for f in frames)
    said = compared.caption(committed, frames[1])
    assert said.startswith(f"Committed: {one}; an earlier one, float32. Recomputed: {other}, float32.")
    table = compared.table(committed, frames[1], compared.pair(committed, frames[1]))
    assert set(table["machine"]) == {f"{one}; an earlier one"} and set(table["machine_here"]) == {other}


def test_a_margin_that_is_off_is_named(frames: tuple[Frames, Frames]) -> None:
    scores = frames[0].scores.assign(margin=frames[0].scores["margin"] + 0.002)
    (problem,) = problems(frames[0]._replace(scores=scores), frames[1])
    assert problem.startswith("H's margin is off by 0.002")


# --- make reproduce -------------------------------------------------------------------------------------


def test_reproduce_ends_well_and_a_damaged_record_ends_it_badly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two notebooks stand for all: one that shows committed numbers, and the one that compares."""
    shelf = tmp_path / "notebooks"
    shelf.mkdir()
    for number in ("02", "12"):
        shutil.copy(notebooks.find(number), shelf)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", shelf)
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path / "figures"))
    figures = tmp_path / "figures" / "smoke"

    assert notebooks.main(["reproduce", "--from", str(folder), "--minutes", "0"]) == 0
    shown = (figures / "table1_main.csv").read_bytes()
    assert not list(figures.glob("*reproduction*")), "nothing was recomputed"

    broken = shutil.copytree(folder, tmp_path / "broken")
    records = pd.read_parquet(broken / "records.parquet")
    at = records.index[records["arm"] == "base"][0]
    records.loc[at, "correct"] = not records.loc[at, "correct"]
    records.to_parquet(broken / "records.parquet")
    assert notebooks.main(["reproduce", "--from", str(broken), "--minutes", "10"]) == 1
    warning = capsys.readouterr().err
    assert "DOES NOT COME OUT AGAIN" in warning and records.loc[at, "sample"] in warning
    assert records.loc[at, "sample"] in (figures / "table_reproduction_samples.md").read_text()
    assert (figures / "table1_main.csv").read_bytes() != shown, "the committed numbers, right or wrong"

    assert notebooks.main(["reproduce", "--from", str(folder), "--minutes", "10"]) == 0
    assert "the same verdict in 100.0" in capsys.readouterr().err
    assert (figures / "table1_main.csv").read_bytes() == shown
    assert (pd.read_csv(figures / "table_reproduction.csv")["n"] > 0).any()
    assert (figures / "figure_reproduction.png").stat().st_size > 10_000
