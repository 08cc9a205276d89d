"""What it would cost at scale: every hour by hand, and nothing where there are no rates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cells import played
from test_tables import arm, row_of, timed

from study.analysis import figures, look, paper
from study.analysis.scale import SHAPES, Gpu, duration, rounded, weights

ON = {"gpu_flops": 1e12, "gpu_utilisation": 0.5, "gpu_decoding": 0.1, "gpu_model": "smollm2-135m"}
GPU = Gpu("A40", 1e12, 0.5, 0.1)
DECODER, HEAD = 106_168_320, 28_311_552  # SmolLM2's, see `test_weights_are_those_of_the_model_cards`


def both_modes():
    """`timed` in both modes: prompts of 400 tokens (exact), user turns of 100, one pass of T."""
    records = timed()
    records["attempts"] = [0, 0, 0, 1, 2, 0]
    exact = records[records["arm"] == "tt_si"].assign(mode="exact", seconds_t=[10.0, 12.0, 0.0])
    return pd.concat([records, exact.assign(tokens_t=[400, 400, 0])], ignore_index=True)


@pytest.fixture(autouse=True)
def no_bench(tmp_path, monkeypatch):
    """`make bench` has not been run: its table would lie in this folder."""
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))


def priced(records, queries=(1000,), gpus=(1,), **other):
    """What notebook 08 makes of records, one pass over each sample."""
    given = ON | {"sft_samples": 1000, "queries": list(queries), "gpus": list(gpus)} | other
    run = {"benchmarks": {"sealtool": None}, "epochs": 1, "k": 1, "sft_epochs": 1}
    return played("08", records, study=run, **given)


def scaled(records, *args, **other):
    return priced(records, *args, **other)["table"]


def hours(table, queries, arm, mode="none", gpus=1):
    return row_of(table, queries=queries, gpus=gpus, arm=arm, mode=mode)


def test_weights_are_those_of_the_model_cards():
    """Billions without embeddings, as Qwen and Hugging Face state them; SmolLM2's 134.5 M share theirs."""
    stated = {
        "qwen2.5-coder-0.5b": 0.36,
        "qwen2.5-coder-1.5b": 1.31,
        "qwen2.5-1.5b": 1.31,
        "qwen2.5-7b": 6.53,
    }
    for model, billions in stated.items():
        assert round(weights(model)[0] / 1e9, 2) == billions
    assert weights("smollm2-135m") == (DECODER, HEAD)
    assert set(stated) | {"smollm2-135m"} == set(SHAPES)
    with pytest.raises(ValueError, match="known: smollm2-135m, "):
        weights("tiny")


def test_a_gpu_on_paper_is_possible():
    for wrong in ((0, 0.5, 0.1), (1e12, 0, 0.1), (1e12, 0.5, 1.1), (float("nan"), 0.5, 0.1)):
        with pytest.raises(ValueError, match="utilisation"):
            Gpu("x", *wrong)
    seconds = (2 * DECODER * 100 + 4 * DECODER * 10) / 5e11 + 2 * (DECODER + HEAD) * 5 / 1e11
    assert GPU.seconds("smollm2-135m", 100, 10, 5) == pytest.approx(seconds)


def test_measured_hours_by_hand():
    table = scaled(both_modes(), [1000, 10**9], [1, 1000])
    assert len(table) == 2 * 2 * 4
    # A third of the queries certain (2.5 s); uncertain ones with their base answer 11.5 s, exact 17.5 s.
    assert hours(table, 1000, "base")["machine_hours"] == pytest.approx(2000 / 3600)
    activated = hours(table, 1000, "tt_si", "activated")["machine_hours"]
    assert activated == pytest.approx(1000 * (2 * 11.5 + 2.5) / 3 / 3600)
    exact = hours(table, 10**9, "tt_si", "exact", gpus=1000)
    assert exact["machine_hours"] == pytest.approx(1e9 * (2 * 17.5 + 2.5) / 3 / 3600)
    assert exact["machine_wall_hours"] == pytest.approx(exact["machine_hours"] / 1000)
    # SFT once at T's exact 11 s a sample, then base answers.
    assert hours(table, 1000, "sft")["machine_hours"] == pytest.approx((11 * 1000 + 2000) / 3600)


def test_the_papers_hours_by_hand():
    table = scaled(both_modes(), [10**6], [10])
    share = 190 / 294
    exact = hours(table, 10**6, "tt_si", "exact", 10)
    assert exact["paper_gpu_hours"] == pytest.approx(1e6 * (share * 10.24 + (1 - share) * 2.14) / 3600)
    assert exact["paper_wall_hours"] == pytest.approx(exact["paper_gpu_hours"] / 10)
    assert hours(table, 10**6, "sft", gpus=10)["paper_gpu_hours"] == pytest.approx((7966.6 + 1.26e6) / 3600)
    assert pd.isna(hours(table, 10**6, "tt_si", "activated", 10)["paper_gpu_hours"]), "none was published"


def test_estimated_hours_by_hand():
    """Per query: (read, trained on, decoded) tokens. H scores 5, G writes 20 and 40, answers have 10."""
    table = scaled(both_modes(), [3], [1])
    counted = {
        ("base", "none"): [(400, 0, 10)] * 3,
        # The turn again for each attempt of G and for the adapted answer; the third query is certain.
        ("tt_si", "activated"): [(605, 100, 30), (705, 100, 50), (405, 0, 10)],
        # The whole prompt again for the adapted answer.
        ("tt_si", "exact"): [(905, 400, 30), (1005, 400, 50), (405, 0, 10)],
    }
    for (name, mode), each in counted.items():
        seconds = sum(
            (2 * DECODER * read + 4 * DECODER * trained) / 5e11 + 2 * (DECODER + HEAD) * decoded / 1e11
            for read, trained, decoded in each
        )
        assert hours(table, 3, name, mode)["estimate_gpu_hours"] == pytest.approx(seconds / 3600), mode
    base = hours(table, 3, "base")["estimate_gpu_hours"]
    sft = hours(table, 3, "sft")["estimate_gpu_hours"]
    assert sft - base == pytest.approx(1000 * 400 * 4 * DECODER / 5e11 / 3600)
    half = scaled(both_modes(), [3], uncertain_share=0.0)
    certain = 3 * GPU.seconds("smollm2-135m", 405, 0, 10) / 3600
    assert hours(half, 3, "tt_si", "exact")["estimate_gpu_hours"] == pytest.approx(certain)


def test_without_exact_nothing_says_how_long_a_prompt_is():
    made = priced(timed())
    table = made["table"]
    assert table["estimate_gpu_hours"].isna().all()
    assert hours(table, 1000, "tt_si", "exact")["note"] == look.NOT_RUN
    assert hours(table, 1000, "tt_si", "activated")["machine_hours"] > 0
    assert made["said"].count(f"| TT-SI exact | {look.NOT_RUN} |") == 1
    assert "**A40, estimated**: mode exact, whose training reads whole prompts, was not run" in made["said"]
    assert "Estimate for one A40: mode exact" in made["said"]


def test_only_exact_counts_whole_prompts_for_g():
    records = both_modes()
    table = scaled(records[records["mode"] != "activated"], [2])
    each = [(1205, 400, 30), (1605, 400, 50), (405, 0, 10)]
    seconds = sum(GPU.seconds("smollm2-135m", *tokens) for tokens in each) * 2 / 3
    assert hours(table, 2, "tt_si", "exact")["estimate_gpu_hours"] == pytest.approx(seconds / 3600)


@pytest.mark.parametrize("kept", [[], ["base"]])
def test_what_was_not_run_has_no_hours(kept):
    records = timed()
    records = records[records["arm"].isin(kept)]
    made = priced(records)
    table = made["table"]
    measured = table["machine_hours"].dropna()
    assert measured.tolist() == pytest.approx([2000 / 3600] * len(kept))
    assert table["paper_gpu_hours"].notna().sum() == 3
    lines = made["lines"]
    assert set(lines["source"]) == ({"machine", "paper"} if kept else {"paper"})
    said = made["said"][made["said"].index("| queries |") :]
    assert "nan" not in said
    assert look.NOT_RUN in said[: said.index("Assumed")] and look.NOT_RUN in said[said.index("Assumed") :]
    assert made["figure"] and figures.figure_scale(lines)


def test_a_certain_run_and_failed_syntheses_have_their_price():
    """A synthesis that failed costs its attempts and the base answer; all uncertain is no lack of rates."""
    records = both_modes()
    ours = records["arm"] == "tt_si"
    records.loc[ours & ~records["adapted"].astype(bool), ["uncertain", "attempts", "tokens_g"]] = [
        True,
        6,
        70,
    ]
    table = scaled(records, [3])
    each = [(605, 100, 30), (705, 100, 50), (400 + 5 + 6 * 100, 0, 80)]
    seconds = sum(GPU.seconds("smollm2-135m", *tokens) for tokens in each)
    assert hours(table, 3, "tt_si", "activated")["estimate_gpu_hours"] == pytest.approx(seconds / 3600)


def test_a_gpu_counts_once_it_was_measured(tmp_path):
    made = priced(both_modes())
    assert made["rates"]["gpu"] == {} and "A GPU, measured by make bench**: not measured." in made["said"]
    assert set(made["view_of_hours"]["measured GPU, GPU-hours"]) == {"not measured"}
    stages = {"prefix": 0.1, "base": 0.2, "h": 0.3, "g": 0.4, "t": 0.6, "answer": 0.5}
    rows = [
        {"dtype": "float32", "benchmark": "sealtool", "sample": s, "n": 1, "program": "exact", "stage": k,
         "seconds": v * f, "device": d}
        for s in "ab" for k, v in stages.items() for d, f in (("cuda:0", 1), ("cpu", 50))
    ]  # fmt: skip
    path = tmp_path / "bench.csv"
    pd.DataFrame(rows).query("device == 'cpu'").drop(columns="device").to_csv(path)
    assert priced(both_modes())["rates"]["gpu"] == {}, "a bench of a processor is no GPU's"
    pd.DataFrame(rows).to_csv(path)
    made = priced(both_modes(), [3000, 30_000])
    table = made["table"]
    # 2 of 3 uncertain: prefix, H, G, T, answer; certain: prefix, H, base. SFT: T's time for three passes.
    expected = {("base", "none"): 0.3, ("tt_si", "exact"): (2 * 1.9 + 0.6) / 3}
    for (name, mode), seconds in expected.items():
        row = hours(table, 3000, name, mode)
        assert row["measured_gpu_hours"] == pytest.approx(3000 * seconds / 3600)
    sft = hours(table, 3000, "sft")["measured_gpu_hours"]
    assert sft == pytest.approx((1000 * 0.6 / 3 + 3000 * 0.3) / 3600)
    assert pd.isna(hours(table, 3000, "tt_si", "activated")["measured_gpu_hours"])
    assert "gpu" in set(made["lines"]["source"])


def test_the_figure_draws_what_the_table_says():
    made = priced(both_modes(), [10**i for i in range(3, 10)])
    table, lines = made["table"], made["lines"]
    ends = lines[np.isclose(lines["queries"], 1e9)].set_index(["source", "arm", "mode"])["times_base"]
    theirs, base = (hours(table, 10**9, *of)["paper_gpu_hours"] for of in (("tt_si", "exact"), ("base",)))
    assert ends["paper", "tt_si", "exact"] == pytest.approx(theirs / base)
    assert (ends[:, "base", "none"] == 1).all(), "seconds of different machines are never on one axis"
    assert len(ends) == 4 + 3 + 4
    drawn = figures.figure_scale(lines, "A40")
    panels = [axes for axes in drawn.axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [4, 3, 4]
    assert all((axes.get_xscale(), axes.get_yscale()) == ("log", "log") for axes in panels)
    words = " ".join(t.get_text() for t in drawn.texts)
    assert "A GPU, measured" in words, "what isn't drawn is named"


def test_a_source_is_never_passed_off_as_another():
    made = priced(both_modes())
    reading, caption = made["said"], made["scale_caption"]
    assert "The paper's A40, as published**: base 1.26 s per query, TT-SI exact 7.37 s (5.9 times" in reading
    assert "measured by make bench**: not measured." in reading
    assert "of this run, Qwen2.5-Coder-0.5B-Instruct" in caption, "whose seconds they are"
    for assumed in ("1 TFLOP/s × 0.5 reading", "× 0.1 decoding", "SmolLM2", "1,000 samples", "costs nothing"):
        assert assumed in caption
    assert "times the estimate's" not in reading, "another model than the paper's"
    assert "times the estimate's" in priced(both_modes(), gpu_model=paper.MODEL)["said"]


def test_the_arm_sft_is_believed_where_it_ran_in_that_mode():
    trained = arm("sft", [1, 1, 1], seconds_fit=30.0, pool_n=10.0, seconds_answer=2.0).assign(mode="exact")
    table = scaled(pd.concat([both_modes(), trained]))
    assert hours(table, 1000, "sft")["machine_hours"] == pytest.approx((3 * 1000 + 2000) / 3600)


def test_numbers_for_reading():
    shown = {
        0.0: "0",
        0.003931: "0.00393",
        5.816: "5.82",
        34.0: "34.0",
        146.4: "146",
        2_047_222.0: "2,050,000",
    }
    assert {x: rounded(x) for x in shown} == shown
    assert rounded(float("nan")) == ""
    spans = {
        1 / 3600: "1 s",
        0.0175: "1.1 min",
        3.5: "3.5 h",
        47.0: "2.0 d",
        8766 * 39.9: "40 y",
        20.0: "20 h",
    }
    assert {x: duration(x) for x in spans} == spans
