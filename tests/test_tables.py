"""Tables and figures from made-up records: every number by hand, and nothing silently missing."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cells import played

from study.analysis import awareness, costs, detection, figures, look, paper, selective, statistics, synthetic
from study.analysis.answers import joined, split
from study.run.config import load_profile
from ttsi.types import Call, Example, Synthesis


def record(sample, correct, arm="base", benchmark="sealtool", **other):
    row = {
        "profile": "full", "benchmark": benchmark, "sample": f"{benchmark}-{sample}", "cluster": f"c{sample}",
        "seed": 0, "arm": arm, "inference": "direct", "mode": "none" if arm == "base" else "activated",
        "model": "qwen2.5-coder-0.5b", "tool_order": "shuffled", "correct": correct, "status": "ok",
        "margin": float("nan") if arm == "base" else 0.5,
        "uncertain": arm != "base", "adapted": arm != "base",
        "synthesis_failed": False, "copy_ratio": float("nan"), "attempts": int(arm != "base"), "n_replies": 1,
        "source": "computed", "variant": "", "pool_n": float("nan"), "code": "ok",
        "flags": "",
    }  # fmt: skip
    return row | other


def arms(base, tt_si, **other):
    """Records of both arms; one entry per sample."""
    rows = [record(i, c, **other) for i, c in enumerate(base)]
    return pd.DataFrame(rows + [record(i, c, arm="tt_si", **other) for i, c in enumerate(tt_si)])


def cell(table, column, arm="tt_si", benchmark="sealtool", mode=None):
    rows = table[(table["arm"] == arm) & (table["benchmark"] == benchmark) & (table["inference"] == "direct")]
    rows = rows[rows["mode"] == mode] if mode else rows
    (value,) = rows[column]
    return value


# --- Table 1 --------------------------------------------------------------------------------------------


def table1(records):
    """Table 1 of notebook 02."""
    return played("02", records, "view")["table"]


def test_a_row_by_hand():
    table = table1(arms([1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]))
    expected = statistics.wilson(3, 8)
    assert cell(table, "n") == 8
    assert cell(table, "correct") == 3
    assert cell(table, "accuracy") == pytest.approx(37.5)
    assert (cell(table, "low"), cell(table, "high")) == pytest.approx(
        (100 * expected.low, 100 * expected.high)
    )
    assert cell(table, "difference") == pytest.approx(12.5)
    assert (cell(table, "gained"), cell(table, "lost"), cell(table, "pairs")) == (2, 1, 8)
    assert cell(table, "p") == 1
    assert cell(table, "mcnemar_p") == "1"
    assert cell(table, "computed") == 8
    assert cell(table, "loaded") == 0
    assert cell(table, "paper") == 72.43
    assert cell(table, "paper_difference") == pytest.approx(5.76)
    assert "8 of the paper's 294 SealTool samples" in cell(table, "setting")
    assert "activated adapters" in cell(table, "setting")


def test_the_promised_columns_come_first():
    promised = "benchmark,arm,inference,mode,n,correct,accuracy,low,high,computed,loaded"
    assert ",".join(table1(arms([1], [1])).columns).startswith(promised)


def test_base_is_never_compared_with_itself():
    table = table1(arms([1, 0], [1, 1]))
    assert pd.isna(cell(table, "difference", arm="base"))
    assert pd.isna(cell(table, "uncertain", arm="base"))


def test_machine_failures_are_counted_and_never_scored():
    records = arms([1, 1, 0], [1, 1, 0])
    records.loc[[0, 4], ["status", "correct"]] = ["error", None]
    table = table1(records)
    assert cell(table, "errors", arm="base") == 1
    assert cell(table, "n", arm="base") == 2
    assert cell(table, "accuracy", arm="base") == pytest.approx(50)
    assert cell(table, "pairs") == 1  # sample 0 failed under base, sample 1 under tt_si
    assert cell(table, "difference") == 0


def test_only_failures_is_said():
    table = table1(arms([None, None], [1, 0]).assign(status=["error", "error", "ok", "ok"]))
    assert "machine failures only" in cell(table, "note", arm="base")
    assert pd.isna(cell(table, "accuracy", arm="base"))
    assert pd.isna(cell(table, "difference"))


def test_shares_beside_tt_si():
    """8 samples, 5 uncertain: 1 synthesis failed, 2 of the 4 examples are copies of their seed."""
    records = arms([0] * 8, [0] * 8)
    mine = records["arm"] == "tt_si"
    records.loc[mine, "uncertain"] = [True] * 5 + [False] * 3
    records.loc[mine, "synthesis_failed"] = [True] + [False] * 7
    records.loc[mine, "copy_ratio"] = [np.nan, 1.0, 1.0, 0.998, 0.4] + [np.nan] * 3
    table = table1(records)
    assert cell(table, "uncertain") == pytest.approx(62.5)
    assert cell(table, "synthesis_failed") == pytest.approx(20)
    assert cell(table, "copies") == pytest.approx(40)


def test_an_answer_that_is_there_twice_is_an_error():
    records = arms([1, 0], [1, 0])
    with pytest.raises(ValueError, match="duplicate"):
        split(pd.concat([records, records.iloc[:1]]))


def test_seeds_are_averaged_per_sample():
    records = pd.concat([arms([1, 0, 0], [1, 1, 0]), arms([0, 0, 0], [1, 0, 0]).assign(seed=1)])
    table = table1(records)
    assert cell(table, "n") == 3
    assert cell(table, "seeds") == 2
    assert cell(table, "correct") == pytest.approx(1.5)
    assert cell(table, "difference") == pytest.approx(100 / 3)
    assert cell(table, "mcnemar_p") == "1; 1"


def test_modes_stand_side_by_side_on_the_same_base():
    records = arms([0] * 4, [1, 0, 0, 0])
    exact = records[records["arm"] == "tt_si"].assign(mode="exact", correct=[1, 1, 0, 0])
    table = table1(pd.concat([records, exact]))
    assert cell(table, "difference", mode="activated") == pytest.approx(25)
    assert cell(table, "difference", mode="exact") == pytest.approx(50)


def test_tool_orders_are_never_paired_with_each_other():
    records = arms([0] * 4, [1, 0, 0, 0])
    records.loc[records["arm"] == "tt_si", "tool_order"] = "original"
    assert pd.isna(cell(table1(records), "difference"))


def test_average_needs_all_three_benchmarks():
    parts = [arms([1, 0, 0, 0], [1, 1, 0, 0], benchmark=b) for b in paper.N]
    assert look.AVERAGE not in set(table1(pd.concat(parts[:2]))["benchmark"])
    table = table1(pd.concat(parts))
    assert cell(table, "accuracy", benchmark="avg") == pytest.approx(50)
    assert cell(table, "n", benchmark="avg") == 12
    assert cell(table, "difference", benchmark="avg") == pytest.approx(25)
    assert cell(table, "paper", benchmark="avg") == 65.62
    width = cell(table, "high", benchmark="avg") - cell(table, "low", benchmark="avg")
    assert width == pytest.approx((cell(table, "high") - cell(table, "low")) / np.sqrt(3))


def test_missing_and_not_run_say_so():
    run = {"missing": {"nexusraven": "set TTSI_DATA"}, "benchmarks": ["sealtool", "nexusraven", "apibank"]}
    table, said = (played("02", arms([1], [1]), study=run)[name] for name in ("table", "said"))
    (missing,) = table[table["benchmark"] == "nexusraven"]["note"]
    assert missing == "missing: set TTSI_DATA"
    absent = table[table["note"] == look.NOT_RUN]
    assert ("sealtool", "majority", "tt_d") in set(
        zip(absent["benchmark"], absent["inference"], absent["arm"], strict=True)
    )
    assert len(absent[absent["benchmark"] == "apibank"]) == 6
    assert absent["accuracy"].isna().all()
    shown = said[said.index("| benchmark") :]
    assert shown.count("not run in this profile") == len(absent)
    assert "missing: set TTSI_DATA" in shown


def test_nothing_run_is_a_table_of_what_is_absent():
    made = played("02", pd.DataFrame(), study={"missing": {"bfcl": "get it"}, "benchmarks": ["sealtool"]})
    assert set(made["table"]["note"]) == {look.NOT_RUN, "missing: get it"}
    assert "Nothing was compared" in made["said"]
    assert made["figure"].get_size_inches()[1] > 0


def test_holm_leaves_the_primary_comparison_alone():
    better = [0] * 10, [1] * 6 + [0] * 4  # exact McNemar: 2 / 2**6
    table = table1(pd.concat([arms(*better, benchmark=b) for b in ("sealtool", "apibank", "bfcl")]))
    assert cell(table, "p") == pytest.approx(0.03125)
    assert pd.isna(cell(table, "p_holm"))
    assert cell(table, "p_holm", benchmark="bfcl") == pytest.approx(0.0625)


def test_caption_and_reading_carry_n_and_discordant_counts():
    said = played("02", arms([0] * 12, [1] * 9 + [0] * 3))["said"]
    assert "n = 12, 9 discordant" in said
    reading = said[said.rindex("- **") :]
    assert "+75.0 [" in reading
    assert "9 gained, 0 lost" in reading
    assert "a gain" in reading
    equal = played("02", arms([0] * 12, [0] * 12))["said"]
    assert "no difference shown" in equal[equal.rindex("- **") :]


def test_every_paper_number_averages_to_its_average():
    theirs = paper.numbers("table1").pivot(index=["inference", "arm"], columns="benchmark", values="paper")
    assert len(theirs) == 6
    for row in theirs.to_dict("records"):
        assert np.mean([row[b] for b in paper.N]) == pytest.approx(row["avg"], abs=0.01)


# --- the estimator --------------------------------------------------------------------------------------


def scores(n=60, benchmark="sealtool", seed=0):
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.5
    margin = np.clip(rng.normal(0.5 + 0.2 * right, 0.2), 0, 1)
    return pd.DataFrame({
        "benchmark": benchmark, "sample": [f"{benchmark}-{i}" for i in range(n)], "seed": 0,
        "cluster": [f"c{i}" for i in range(n)], "n_tools": np.where(np.arange(n) % 10, 5, 1),
        "margin": np.where(np.arange(n) % 10, margin, 1.0), "base_correct": right, "log_probs": [[-1.0]] * n,
    })  # fmt: skip


def judged(scores, until="", **given):
    """What notebook 01 makes of scores."""
    return played("01", pd.DataFrame(), until, {"scores": scores}, **given)


def curves_of(scores, **given):
    return judged(scores, "curves", **given)["curves"]


def test_curves_hold_what_statistics_says():
    data = scores()
    curves = curves_of(data, tau=0.5)
    primary = curves[(curves["samples"] == "two or more tools") & (curves["benchmark"] == "sealtool")]
    several = data[data["n_tools"] > 1]
    expected = detection.rates(several["margin"], several["base_correct"], 0.5)
    (at,) = primary[primary["panel"] == "at_tau"].to_dict("records")
    assert (at["tpr"], at["fpr"], at["j_low"]) == pytest.approx(
        (expected.tpr.value, expected.fpr.value, expected.j.low)
    )
    (area,) = primary[primary["panel"] == "auc"]["auc"]
    assert area == pytest.approx(detection.auc(several["margin"], several["base_correct"]).value)
    assert len(primary[primary["panel"] == "tau"]) == 101
    assert {"best_out_of_fold", "best_in_sample"} <= set(primary["panel"])
    paper = curves[curves["panel"] == "paper"]
    assert list(paper["tau"]) == [0.35, 0.95]


def test_too_few_is_named_and_the_rest_drawn():
    made = judged(pd.concat([scores(), scores(6, "bfcl")]))
    curves = made["curves"]
    few = curves[(curves["panel"] == "too_few") & (curves["samples"] == "two or more tools")]
    assert list(few["benchmark"]) == ["bfcl"]
    assert "10 of each are needed" in few["note"].iloc[0]
    assert "pooled" in set(curves["benchmark"])
    reading = made["said"]
    assert "**BFCL**: too few" in reading
    assert "out of fold" in reading
    words = " ".join(t.get_text() for t in figures.figure4_estimator(curves).texts)
    assert "BFCL not drawn, too few" in words.replace("\n", " ")


def test_unscored_samples_are_left_out_of_the_curves():
    data = scores()
    data.loc[1, "margin"] = np.nan
    curves = curves_of(data)
    area = curves[(curves["panel"] == "auc") & (curves["samples"] == "all samples")].iloc[0]
    assert area["n_right"] + area["n_wrong"] == 59


def test_nothing_scored_still_makes_a_figure():
    made = judged(pd.DataFrame())
    curves = made["curves"]
    assert list(curves.columns) == awareness.CURVES
    assert "Nothing was scored" in made["said"]
    assert made["table"].empty and "Too few" in made["said"]
    assert figures.figure4_estimator(curves).get_size_inches()[1] > 0


# --- the data -------------------------------------------------------------------------------------------


def samples_frame():
    """Four samples: one tool once, the gold tool first in one of three as asked and in two upstream."""
    rows = [
        (2, 0, 0, "", 1),
        (2, 1, 0, "duplicate", 1),
        (1, 0, 0, "", 1),
        (3, 2, 2, "duplicate,gold_issue", 2),
    ]
    return pd.DataFrame([
        {"benchmark": "s", "sample": f"s-{i}", "cluster": f"c{i // 2}", "seed": seed, "n_tools": tools,
         "n_turns": 1, "n_calls": calls, "flags": flags, "gold_at": float(at), "gold_at_original": float(was),
         "in_pool": i == 0}
        for seed in (0, 1)
        for i, (tools, at, was, flags, calls) in enumerate(rows)
    ])  # fmt: skip


def test_data_counts_by_hand():
    made = played("00", pd.DataFrame(), "positions", {"samples": samples_frame()})
    (row,) = made["counts"].to_dict("records")
    assert (row["samples"], row["tools_min"], row["tools_median"], row["tools_max"]) == (4, 1, 2, 3)
    assert (row["one_tool"], row["several_calls"], row["clusters"], row["in_pool"]) == (1, 1, 2, 1)
    assert row["flags"] == "duplicate 2, gold_issue 1"
    original, shuffled = made["positions"].to_dict("records")
    assert (original["tool_order"], original["n"], original["first"]) == ("original", 3, 2)
    assert (shuffled["tool_order"], shuffled["n"], shuffled["first"]) == ("shuffled", 3, 1)
    assert shuffled["chance"] == pytest.approx(1 / 2 + 1 / 2 + 1 / 3)


# --- arms on one benchmark ------------------------------------------------------------------------------


def arm(name, correct, **other):
    """One arm's records, one per entry; margins rise with the sample unless given."""
    margins = other.pop("margins", None)
    return pd.DataFrame([
        record(i, c, arm=name, **other) | ({"margin": margins[i]} if margins else {})
        for i, c in enumerate(correct)
    ])  # fmt: skip


def row_of(table, **wanted):
    for column, value in wanted.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


def test_methods_are_paired_with_base_and_with_tt_si():
    records = pd.concat([
        arm("base", [0, 0, 0, 1]), arm("tt_si", [1, 0, 0, 1]), arm("icl_nearest", [1, 1, 0, 0], mode="none"),
    ])  # fmt: skip
    made = played("03", records, study={"lacking": {("sealtool", "sft"): "no training split"}})
    table, said = made["table"], made["said"]
    icl = row_of(table, arm="icl_nearest")
    assert (icl["accuracy"], icl["difference"], icl["gained"], icl["lost"]) == (50, 25, 2, 1)
    assert (icl["tt_si_difference"], icl["tt_si_gained"], icl["tt_si_lost"]) == (0, 1, 1)
    assert icl["paper_difference"] == pytest.approx(67.74 - 66.67)
    assert pd.isna(row_of(table, arm="tt_si")["p_holm"]), "the primary comparison stands alone"
    assert icl["p_holm"] == icl["p"] == 1
    assert row_of(table, arm="sft")["note"] == "no training split"
    assert row_of(table, arm="oracle")["note"] == look.NOT_RUN
    assert row_of(table, arm="oracle")["paper"] == 78.89
    reading = said[said.index("- **") :]
    assert reading.count("points to base") == 2
    assert reading.count("points to tt_si") == 1
    assert "n = 4, 3 discordant" in made["caption"]


def test_of_several_pools_the_largest_stands_among_the_methods():
    pools = [arm("sft_ood", [c, 0], pool_n=float(n)) for n, c in ((1, 0), (8, 1))]
    made = played("03", pd.concat([arm("base", [0, 0]), *pools]))
    table = made["table"]
    ood = row_of(table, arm="sft_ood")
    assert (ood["pool_n"], ood["accuracy"]) == (8, 50)
    assert "sft_ood (8 samples)" in made["said"]


def test_variants_stay_out_of_the_main_tables():
    records = pd.concat([arms([0, 0], [1, 1]).assign(variant=""), arm("tt_si", [0, 0], variant="k4")])
    assert cell(table1(records), "accuracy") == 100
    assert row_of(played("03", records, "view")["table"], arm="tt_si")["accuracy"] == 100


def test_variants_that_only_select_are_parts_of_the_run():
    variants = {"exact": {"arms": ["tt_si"], "mode": "exact"}, "k4": {"k": 4}}
    own = arms([0, 0], [1, 0]).assign(variant="")
    exact = arm("tt_si", [1, 1], mode="exact", variant="exact")
    again = own.assign(variant="exact")  # what both hold is kept once
    whole = joined([own, exact, again, arm("tt_si", [0, 0], variant="k4")], variants)
    assert len(whole) == 4 + 2 + 2
    table = table1(whole)
    assert cell(table, "accuracy", mode="exact") == 100
    assert cell(table, "difference", mode="exact") == 100
    assert joined([], variants).empty


# --- the threshold --------------------------------------------------------------------------------------

MARGINS = [0.1, 0.5, 0.9, 0.99]


def swept(**other):
    """base 0 0 1 1, adapted 1 0 0 1; adapting helps below 0.2 and hurts from 0.6 on."""
    return pd.concat([
        arm("base", [0, 0, 1, 1]),
        arm("tt_si_all", [1, 0, 0, 1], margins=MARGINS, uncertain=True, **other),
    ])  # fmt: skip


def rules(records, taus, at=0.95):
    """Table 2 of notebook 04; `at`: the run's own tau, which `certain only` reads."""
    return played("04", records, "view", {"tau": at}, tau=taus)["table"]


def test_any_threshold_comes_from_stored_answers():
    table = rules(swept(), [0.2, 0.95], at=0.6)
    assert row_of(table, rule="base")["accuracy"] == 50
    low = row_of(table, rule="0.2")
    assert (low["accuracy"], low["n_uncertain"], low["gained"], low["lost"]) == (75, 1, 1, 0)
    assert (low["tpr"], low["fpr"]) == (50, 0)
    high = row_of(table, rule="0.95")
    assert (high["accuracy"], high["n_uncertain"], high["difference"]) == (50, 3, 0)
    assert high["difference_low"] < 0 < high["difference_high"]
    assert (high["tpr"], high["fpr"], high["paper"]) == (100, 50, 72.43)
    certain = row_of(table, rule="certain only")
    assert (certain["tau"], certain["accuracy"], certain["n_uncertain"]) == (0.6, 25, 2)
    assert row_of(table, rule="all")["accuracy"] == 50
    assert pd.isna(row_of(table, rule="base")["difference"])
    assert row_of(table, rule="oracle")["note"] == look.NOT_RUN


def test_a_threshold_beyond_what_was_adapted_is_not_guessed():
    records = pd.concat([arm("base", [0, 0, 1, 1]), arm("tt_si", [1, 0, 1, 1], margins=MARGINS)])
    records.loc[records["arm"] == "tt_si", "uncertain"] = [True, True, False, False]
    table = rules(records, [0.2, 0.6, 0.95])
    assert row_of(table, rule="0.6")["accuracy"] == 75
    missing = "1 of the 3 answers it needs are missing"
    assert row_of(table, rule="0.95")["note"] == f"not run in this profile: {missing}"
    assert pd.isna(row_of(table, rule="0.95")["accuracy"])
    assert "1 of the 3" in played("04", records, tau=[0.95])["said"]
    assert played("04", records)["curve"]["tau"].max() == 0.9


def test_tau_of_the_run_gives_the_arm_itself():
    rng = np.random.default_rng(0)
    base, adapted, margins = rng.random(60) < 0.4, rng.random(60) < 0.5, rng.random(60)
    uncertain = margins < 0.7
    tt_si = arm("tt_si", np.where(uncertain, adapted, base).astype(int), margins=list(margins))
    records = pd.concat([arm("base", base.astype(int)), tt_si.assign(uncertain=uncertain)])
    swept_row = row_of(rules(records, [0.7]), rule="0.7")
    own = row_of(table1(records), arm="tt_si", inference="direct", benchmark="sealtool")
    for column in ("accuracy", "low", "difference", "difference_low", "gained", "lost", "p"):
        assert swept_row[column] == pytest.approx(own[column])
    assert swept_row["tpr"] == pytest.approx(100 * detection.rates(margins, base, 0.7).tpr.value)


def test_a_machine_failure_leaves_its_sample_out_of_the_sweep():
    records = swept()
    failed = (records["arm"] == "tt_si_all") & (records["sample"] == "sealtool-0")
    records.loc[failed, ["status", "correct"]] = ["error", None]
    table = rules(records, [0.2, 0.6])
    assert (row_of(table, rule="0.6")["n"], row_of(table, rule="0.6")["pairs"]) == (3, 3)


def test_no_threshold_without_answers():
    table = rules(arm("base", [1, 0]), [0.5])
    assert table["accuracy"].isna().all()
    assert played("04", arm("base", [1, 0]))["curve"].empty
    assert look.NOT_RUN in played("04", arm("base", [1, 0]))["said"]


# --- scaling and size -----------------------------------------------------------------------------------


def test_the_curve_ends_at_the_arm_and_counts_only_the_uncertain():
    tt_si = arm("tt_si", [1, 1, 0, 1, 1], margins=[0.1, 0.1, 0.1, 0.1, 1.0])
    tt_si["uncertain"] = tt_si["adapted"] = [True, True, True, True, False]
    pools = [arm("sft_ood", [c, 0, 0, 0, 1], pool_n=float(n)) for n, c in ((1, 0), (2, 1))]
    records = pd.concat([arm("base", [0, 0, 0, 0, 1]), tt_si, *pools])
    made = played("05", records, orders=7)
    table = made["table"]
    curve = table[table["arm"] == "tt_si"]
    assert list(curve["training_samples"]) == [1, 2, 3, 4]
    assert curve["accuracy"].is_monotonic_increasing
    assert curve["accuracy"].iloc[-1] == 80
    assert curve["order_low"].iloc[-1] == curve["order_high"].iloc[-1] == 80
    assert curve["difference"].notna().sum() == 1, "only the end is one fixed set of answers"
    assert row_of(table, arm="sft_ood", training_samples=2)["difference"] == 20
    assert row_of(table, arm="base")["accuracy"] == 20
    assert row_of(table, arm="tt_d")["note"] == look.NOT_RUN
    pd.testing.assert_frame_equal(table, played("05", records, "names", orders=7)["table"])
    assert "+60.0" in made["said"]


def test_sizes_are_compared_on_the_samples_that_all_answered():
    small = arms([0, 0, 0, 1], [1, 0, 0, 1]).assign(variant="")
    large = arms([1, 1], [1, 1]).assign(variant="larger", model="qwen2.5-coder-1.5b")
    original = arms([1, 1], [1, 1]).assign(variant="o", tool_order="original")
    variants = {"larger": {"model": "qwen2.5-coder-1.5b"}, "o": {"tool_order": "original"}}
    variants["huge"] = {"model": "qwen2.5-7b"}
    made = played("06", pd.concat([small, large, original]), study={"variants": variants})
    table = made["table"]
    assert set(table.loc[table["n"].notna(), "n"]) == {2}
    assert row_of(table, model="qwen2.5-coder-0.5b", arm="tt_si")["difference"] == 50
    assert row_of(table, model="qwen2.5-coder-1.5b", arm="tt_si")["difference"] == 0
    absent = table[(table["model"] == "qwen2.5-7b") & (table["note"] == look.NOT_RUN)]
    assert len(absent) == 1
    assert row_of(table, model="qwen2.5-7b", arm="tt_si")["paper"] == 83.97
    assert "nothing about how the gain changes" not in made["said"]


# --- estimators side by side ----------------------------------------------------------------------------


def test_estimators_judge_the_same_answers():
    data = scores(80).assign(trivial=0.0)
    data["rss"] = data["margin"]
    data["perplexity"] = np.where(np.arange(80) < 20, np.nan, data["margin"])
    data["few"] = np.where(np.arange(80) < 70, np.nan, data["margin"])
    wanted = {"rss": "margin", "trivial": "trivial", "perplexity": "perplexity", "votes_": "votes"}
    made = judged(data)
    table = made["compared"](wanted | {"few": "few"}, 0.5)
    mine = table[table["samples"] == "two or more tools"]
    kept = data[(data["n_tools"] > 1) & data["perplexity"].notna()]
    one, other = row_of(mine, estimator="margin"), row_of(mine, estimator="perplexity")
    assert one["auc"] == other["auc"] == detection.auc(kept["margin"], kept["base_correct"]).value
    assert one["tau_tpr"] == detection.rates(kept["margin"], kept["base_correct"], 0.5).tpr.value
    assert one["best_j"] <= one["peak_j"]
    assert one["tau_f1_low"] < one["tau_f1"] < one["tau_f1_high"]
    assert pd.isna([one["best_j_low"], one["best_f1_low"]]).all(), "that of a fixed threshold is too narrow"
    assert 0 < one["best_p"] < 0.05 and one["best_chance"] < one["best_j"]
    flagged = row_of(mine, estimator="trivial")
    assert flagged["best_f1_low"] < flagged["best_f1"] < flagged["best_f1_high"]
    wrong = int((~kept["base_correct"]).sum())
    assert row_of(mine, estimator="trivial")["best_f1"] == pytest.approx(2 * wrong / (len(kept) + wrong))
    assert row_of(mine, estimator="trivial")["auc"] == 0.5
    assert row_of(mine, estimator="votes")["note"] == look.NOT_RUN
    assert "samples only" in row_of(mine, estimator="few")["note"], "and the others keep their samples"
    assert "overlaps" in "".join(made["largest"](table))


def test_too_few_to_compare_estimators_is_said():
    made = judged(scores(8).assign(rss=0.5))
    notes = made["compared"]({"rss": "margin"})["note"]
    assert len(notes) and notes.str.contains("10 of each are needed").all()
    assert "Too few" in made["said"]


# --- synthetic data -------------------------------------------------------------------------------------


def embedded():
    """Three seeds at right angles; a's and b's questions beside their own, c's beside a."""
    places = {
        ("a", "seed"): (1, 0, 0), ("b", "seed"): (0, 1, 0), ("c", "seed"): (0, 0, 1),
        ("a", "synthetic"): (0.9, 0.1, 0), ("b", "synthetic"): (0, 1, 0), ("c", "synthetic"): (1, 0, 0.1),
    }  # fmt: skip
    rows = [
        {"benchmark": "bfcl", "sample": s, "seed": 0, "kind": k, "index": 0} | dict(zip(PCS, p, strict=True))
        for (s, k), p in places.items()
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(PCS, "float16"))


PCS = ("pc0", "pc1", "pc2")


def distances(embeddings):
    """The table of distances of notebook 07."""
    return played("07", pd.DataFrame(), "distances", {"embeddings": embeddings})["distances"]


def quality(examples, records):
    """The table of synthetic data of notebook 07."""
    return played("07", records, "table", {"examples": examples})["table"]


def test_distances_by_hand():
    points = synthetic.laid_out(embedded())
    (row,) = distances(embedded()).to_dict("records")
    assert (row["questions"], row["seeds_compared"]) == (3, 3)
    assert row["nearest_own"] == pytest.approx(200 / 3)
    own = points.loc[points["kind"] == "synthetic"].set_index("sample")["own"]
    assert own["b"] == pytest.approx(0, abs=1e-9)
    assert own["c"] > 1
    flipped = embedded().assign(pc0=lambda d: -d["pc0"], pc1=lambda d: -d["pc1"], pc2=lambda d: -d["pc2"])
    again = synthetic.laid_out(flipped)
    np.testing.assert_allclose(np.abs(again["x"]), np.abs(points["x"]), atol=1e-6)


def test_projections_repeat_and_an_unknown_one_is_refused():
    rng = np.random.default_rng(0)
    many = pd.DataFrame(rng.normal(size=(24, 3)), columns=list(PCS))
    kinds = ["seed", "synthetic"] * 12
    many = many.assign(benchmark="s", sample=[str(i // 2) for i in range(24)], seed=0, kind=kinds, index=0)
    for projection in ("pca", "tsne"):
        one, two = (synthetic.laid_out(many, projection) for _ in range(2))
        np.testing.assert_allclose(one[["x", "y"]], two[["x", "y"]], atol=1e-6)
    with pytest.raises(ValueError, match="there are pca, tsne"):
        synthetic.laid_out(many, "umap")
    assert synthetic.laid_out(pd.DataFrame()).empty


def test_quality_counts_copies_validity_and_failures():
    records = arms([0] * 4, [0] * 4)
    mine = records["arm"] == "tt_si"
    records.loc[mine, "synthesis_failed"] = [True, False, False, False]
    # Both modes train on the same synthesis: it is asked for once.
    records = pd.concat([records, records[mine].assign(mode="exact")])
    examples = pd.DataFrame({
        "benchmark": "sealtool", "sample": ["1", "2", "3"], "seed": 0, "writer": "self", "index": 0,
        "attempt": [0, 2, 0], "copy_ratio": [1.0, 0.998, 0.4], "schema_errors": [0, 0, 2],
        "tool": ["x", "x", "y"], "question_sha256": ["p", "q", "q"],
    })  # fmt: skip
    (row,) = quality(examples, records).to_dict("records")
    assert (row["asked"], row["failed"], row["examples"]) == (4, 1, 3)
    assert (row["copies"], row["valid"], row["attempts"]) == (1, 2, pytest.approx(5 / 3))
    assert (row["distinct_tools"], row["distinct_questions"]) == (2, 2)
    assert row["top_tool_share"] == pytest.approx(200 / 3)
    nothing = quality(examples.iloc[:0], records)
    assert nothing["note"].tolist() == [look.NOT_RUN]


def test_seeds_make_no_more_samples_of_synthetic_data():
    """Three seeds that agree: the same shares and intervals as one, though the counts are threefold."""
    records = arms([0] * 4, [0] * 4)
    records.loc[records["arm"] == "tt_si", "synthesis_failed"] = [True, False, False, False]
    examples = pd.DataFrame({
        "benchmark": "sealtool", "sample": ["1", "2", "3"], "seed": 0, "writer": "self", "index": 0,
        "attempt": 0, "copy_ratio": [1.0, 0.998, 0.4], "schema_errors": [0, 0, 2], "tool": "x",
        "question_sha256": ["p", "q", "q"],
    })  # fmt: skip

    def thrice(frame):
        return pd.concat([frame.assign(seed=s) for s in range(3)], ignore_index=True)

    (one,) = quality(examples, records).to_dict("records")
    (three,) = quality(thrice(examples), thrice(records)).to_dict("records")
    assert (three["asked"], three["failed"], three["copies"], three["valid"]) == (12, 3, 3, 6)
    alone = statistics.wilson(1, 3)
    assert (one["copies_low"], one["copies_high"]) == (100 * alone.low, 100 * alone.high)
    for share in ("failed", "copies", "valid"):
        ends = [f"{share}_share", f"{share}_low", f"{share}_high"]
        assert [three[c] for c in ends] == pytest.approx([one[c] for c in ends])
    near, often = (distances(e) for e in (embedded(), thrice(embedded())))
    assert (near["questions"].item(), often["questions"].item()) == (3, 9)
    alone = statistics.wilson(2, 3)
    assert (near["nearest_own_low"].item(), near["nearest_own_high"].item()) == (
        100 * alone.low,
        100 * alone.high,
    )
    ends = ["nearest_own", "nearest_own_low", "nearest_own_high"]
    assert often[ends].iloc[0].tolist() == pytest.approx(near[ends].iloc[0].tolist())


def test_good_and_bad_examples_are_the_first_not_the_best():
    def wrote(question, ratio, errors=()):
        return Synthesis((Example(question, (Call("f", {"a": 1}),), ratio, errors),))

    written = {
        "a": wrote("new", 0.5), "b": wrote("same", 1.0), "c": wrote("odd", 0.2, ("a: not a string",)),
        "d": Synthesis((), ("bad_json",)), "e": wrote("newer", 0.1),
    }  # fmt: skip
    asked = [SimpleNamespace(id="a", query=SimpleNamespace(question="seed of a"))]
    run = {"benchmarks": {"bfcl": 5}, "written": written, "asked": asked}
    good, bad = (played("07", pd.DataFrame(), study=run)[name] for name in ("good", "bad"))
    assert [g.splitlines()[1] for g in good] == ["written: new", "written: newer"]
    assert "seed of a" in good[0]
    assert "a copy" in bad[0]
    assert "not a string" in bad[1]
    assert "failed:  bad_json" in bad[2]


# --- cost -----------------------------------------------------------------------------------------------


def timed():
    """Two adapted samples and a certain one; base answers take 2 s."""
    base = arm("base", [0, 0, 1], seconds_answer=2.0, tokens_answer=10, margin=np.nan, adapted=False)
    ours = arm("tt_si", [0, 1, 1], seconds_answer=2.0, tokens_answer=10)
    ours["uncertain"] = ours["adapted"] = [True, True, False]
    ours = ours.assign(seconds_h=0.5, tokens_h=5, seconds_g=[1.0, 3.0, 0.0], tokens_g=[20, 40, 0],
                       seconds_t=[4.0, 6.0, 0.0], tokens_t=[100, 100, 0])  # fmt: skip
    none = {f"{what}_{stage}": 0 for what in ("seconds", "tokens") for stage in "hgt"}
    return pd.concat([base.assign(**none), ours]).assign(reply="r")


def costed(records, **given):
    """What notebook 08 makes of records."""
    return played("08", records, **given)


def test_costs_by_hand():
    made = costed(timed())
    table = made["cost"]
    seconds = {r["stage"]: r["seconds"] for r in table.to_dict("records")}
    assert seconds == {
        "base": 2, "pass": 2, "h": 0.5, "g": 2, "t": 5, "answer": 2, "uncertain": 11.5, "certain": 2.5,
    }  # fmt: skip
    whole = row_of(table, stage="uncertain")
    assert (whole["n"], whole["tokens"], whole["times_base"]) == (2, 155, 5.75)
    assert whole["seconds_low"] < 11.5 < whole["seconds_high"]
    assert whole["paper_times_base"] == pytest.approx(10.24 / 1.26)
    assert "5.8 times a base answer" in made["said"]
    base = row_of(table, stage="base")
    assert np.isnan(base["seconds_low"]), "the shares of one batch are one measurement"


def test_break_even_by_hand():
    ours, paper = costed(timed(), sft_samples=1000)["prices"]
    assert ours.tt_si == pytest.approx((2 * 11.5 + 2.5) / 3)  # uncertain queries with their base answer
    assert ours.sft == 5000
    assert ours.break_even == pytest.approx(5000 / (25.5 / 3 - 2))
    share = 190 / 294
    assert paper.break_even == pytest.approx(7966.6 / (share * 10.24 + (1 - share) * 2.14 - 1.26))
    trained = arm("sft", [1, 1, 1], seconds_fit=30.0, pool_n=10.0, seconds_answer=2.0)
    (measured, _) = costed(pd.concat([timed(), trained]), sft_samples=1000)["prices"]
    assert measured.sft == 3000
    assert "arm sft, 10 samples" in measured.basis
    made = costed(timed(), sft_seconds=100.0, uncertain_share=0.0)
    (given, _) = made["prices"]
    assert given.break_even == pytest.approx(100 / 0.5)
    curves = made["curves"][made["curves"]["name"] == given.name]
    later = curves[(curves["panel"] == "queries") & (curves["queries"] > 201)]
    assert len(later) and (later["tt_si"] > later["sft"]).all()
    assert "200 queries" in made["said"]


def test_modes_are_paired_with_each_other():
    records = pd.concat([timed(), timed().assign(mode="exact", correct=[0, 0, 1, 1, 0, 1], reply="s")])
    records = records[(records["arm"] == "tt_si") | (records["mode"] == "none")]
    row = row_of(costed(records)["modes"], benchmark="sealtool")
    assert (row["difference"], row["gained"], row["lost"], row["same_reply"]) == (0, 1, 1, 0)
    assert costed(timed())["modes"]["note"].tolist() == [look.NOT_RUN]


def test_selective_is_charged_with_both_answers():
    chosen = timed().query("arm == 'tt_si'").assign(arm="tt_si_selective", seconds_h=0.0)
    chosen["seconds_answer"] += 2.0 * chosen["adapted"]  # the base answer is in it
    table = costed(pd.concat([timed(), chosen]))["cost"]
    assert row_of(table, stage="selective")["seconds"] == 2 + 2 + 5 + 2
    assert row_of(table, stage="selective_run")["seconds"] == pytest.approx((2 * 11 + 2) / 3)


def test_what_bench_measured_is_shown(tmp_path, monkeypatch):
    taken = {"usual": 2.0, "exact": 1.0, "activated": 0.5}
    rows = [
        {"dtype": "float32", "benchmark": "sealtool", "sample": s, "n": 1, "program": p, "stage": stage,
         "seconds": x * f, "flops": np.nan, "reached": np.nan, "decoded_tokens": 1}
        for p, x in taken.items() for s, f in (("a", 1), ("b", 4))
        for stage in costs.needs(costs.WAYS[p])
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "bench.csv", index=False)
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    said = costed(timed())["said"]
    assert (
        "| uncertain sample, usual loop / activated, SealTool | float32 | 2 | 6.40 [6.40, 6.40] | ≥ 9 |"
        in said
    )
    assert "| float32 | SealTool | usual | 2 |" in said
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path / "none"))
    assert "Not measured" in costed(timed())["said"]


# --- controls -------------------------------------------------------------------------------------------


def test_controls_stand_beside_base_and_tt_si():
    variants = {
        "original": {"tool_order": "original", "mode": "activated"},
        "noise": {"seeds": [1], "arms": ["base"]},
        "larger": {"model": "qwen2.5-coder-1.5b"},
    }  # fmt: skip
    records = pd.concat([
        arms([0, 0, 1, 1], [1, 1, 1, 1]).assign(variant=""),
        arm("generic", [1, 0, 1, 1], variant=""),
        arms([1, 1], [1, 0]).assign(variant="original", tool_order="original"),
        arm("base", [0, 1, 1, 0], variant="noise", seed=1),
        arms([1], [1]).assign(variant="larger", model="qwen2.5-coder-1.5b"),
    ])  # fmt: skip
    made = played("09", records, study={"variants": variants})
    table = made["table"]
    generic = row_of(table, control="generic")
    assert (generic["base_difference"], generic["tt_si_difference"]) == (25, -25)
    original = row_of(table, variant="original", arm="tt_si")
    assert (original["own_difference"], original["base_difference"]) == (-50, 50)
    assert original["control"] == "tool_order = original"
    noise = row_of(table, variant="noise")
    assert (noise["base_gained"], noise["base_lost"], noise["base_pairs"]) == (1, 1, 4)
    assert pd.isna(noise["tt_si_p_holm"]), "a base row is held against base"
    assert "larger" not in set(table["variant"])
    assert row_of(table, control="amortised")["note"] == look.NOT_RUN
    assert row_of(table, control="learning_rate")["note"] == look.NOT_RUN
    assert "tool_order" not in set(table.loc[table["note"] == look.NOT_RUN, "control"])
    reading = made["said"]
    assert "**generic**" in reading
    assert "Not run in this profile: donor" in reading


def test_error_codes_before_and_after():
    records = arms([0, 0, 1, 0], [1, 0, 0, 0]).assign(adapted=False, code="ok")
    mine = records["arm"] == "tt_si"
    records.loc[~mine, "code"] = ["no_call", "wrong_value", "ok", "wrong_type"]
    records.loc[mine, "code"] = ["ok", "wrong_value", "wrong_name", "bad_json"]
    records.loc[mine, "adapted"] = [True, True, True, False]
    made = played("09", records)
    moved = made["moved"]
    assert moved["n"].sum() == 3, "only what was adapted"
    view = made["grid"]
    assert view.loc["no_call", "ok"] == 1
    assert view.loc["all before" if "all before" in view.index else "all after", "all before"] == 3
    reading = made["said"]
    assert "mended: no_call 1" in reading
    assert "made: wrong_name 1" in reading
    assert "No sample was adapted" in played("09", records.assign(adapted=False))["said"]


# --- writing --------------------------------------------------------------------------------------------


def test_model_text_cannot_break_a_table_or_be_html():
    shown = look.markdown(pd.DataFrame({"reply": ["<script>a|b</script>\nc"]}))
    assert shown.splitlines()[2] == "| &lt;script&gt;a\\|b&lt;/script&gt; c |"
    assert "<script" not in look.quote("<script>alert(1)</script>")


def test_saved_files_are_complete_stable_and_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    made = played("02", arms([1, 0, 0], [1, 1, 0]), "view")
    path = tmp_path / "full" / "table1_main.csv"
    shown = look.save_table(made["table"], "table1_main", "full", "the caption", made["view"])
    assert path.with_suffix(".md").read_text() == shown and shown.endswith("\nthe caption\n")
    first = path.read_bytes()
    look.save_table(made["table"], "table1_main", "full")
    assert path.read_bytes() == first
    back = pd.read_csv(io.BytesIO(first))
    assert cell(back, "correct") == 2
    assert cell(back, "accuracy") == pytest.approx(66.6667, abs=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == ["table1_main.csv", "table1_main.md"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = look.write(tmp_path / "table.csv", b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        look.write(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


# --- layouts, and what nobody can know -------------------------------------------------------------------


def test_layouts_compare_on_samples_that_were_asked_in_every_way() -> None:
    rows = [record(i, i < 3, form="tagged") for i in range(6)]
    rows += [record(i, i == 0, variant="paper", form="fenced" if i else "none") for i in range(4)]
    rows += [record(5, True, variant="paper", status="error", form="")]
    rows += [record(0, True, variant="paper", inference="majority", form="bare")]
    run = {"variants": {"paper": {"layout": "paper", "arms": ["base"]}}, "samples": samples_frame()}
    table = played("00", pd.DataFrame(rows), study=run)["table"].set_index("way")
    assert list(table["n"]) == [4, 4]
    assert list(table["accuracy"]) == [75.0, 25.0]
    assert table.loc["paper", ["tagged", "fenced", "bare", "none"]].tolist() == [0.0, 75.0, 0.0, 25.0]
    assert (table["low"] < table["accuracy"]).all() and (table["accuracy"] < table["high"]).all()


def test_accuracy_without_what_nobody_can_know() -> None:
    rows = [record(i, i == 0, flags="duplicate,unknowable" if i > 1 else "duplicate") for i in range(4)]
    rows += [record(9, True, variant="other"), record(9, True, inference="majority")]
    table = played("02", pd.DataFrame(rows), "known")["known"].set_index("samples")
    assert table.loc["all", ["n", "accuracy"]].tolist() == [4, 25.0]
    assert table.loc["knowable", ["n", "accuracy"]].tolist() == [2, 50.0]


def test_areas_are_compared_on_the_same_answers() -> None:
    """DeLong against the first estimator, Holm over the others; what never varies has no such test."""
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.5
    group = pd.DataFrame({
        "benchmark": "b", "sample": [f"s{i}" for i in range(80)], "cluster": [f"s{i}" for i in range(80)],
        "seed": 0, "n_tools": 3, "base_correct": right, "margin": rng.random(80),
        "good": right + rng.normal(0, 0.6, 80), "poor": rng.random(80), "flat": 0.0,
    })  # fmt: skip
    names = {"margin": "margin", "good": "good", "poor": "poor", "flat": "flat"}
    table = awareness.side_by_side(group, names).set_index("estimator")
    assert table.loc["good", "auc_difference"] == pytest.approx(
        table.loc["good", "auc"] - table.loc["margin", "auc"]
    )
    assert table.loc["good", "auc_difference_low"] > 0 and table.loc["good", "auc_p_holm"] < 0.01
    assert table.loc["good", "auc_p_holm"] == pytest.approx(2 * table.loc["good", "auc_p"])
    assert table["auc_difference"].isna().to_dict() == {
        "margin": True, "good": False, "poor": False, "flat": True
    }  # fmt: skip


def complete(records: pd.DataFrame, scores: pd.DataFrame, asked: selective.Asked = selective.PRIMARY) -> bool:
    """Whether a set is tested: all of it was attempted."""
    return selective.attempted(records, scores, asked) == asked.samples


def test_what_is_confirmed_is_the_whole_of_what_was_written_down() -> None:
    counts = {**selective.PRIMARY.samples} | {"sealtool": 4}
    whole = pd.DataFrame(
        [
            {"benchmark": b, "sample": f"{b}-{i}", "likelihood": 0.5, "seed": 0}
            for b, n in counts.items()
            for i in range(n)
        ]
    )
    of = whole.assign(inference="direct", status="ok", model="qwen2.5-coder-0.5b", dtype="float32")
    of = of.assign(mode="activated", adapted=False)
    base, adapted = of.assign(arm="base"), of.assign(arm=selective.ADAPTED, adapted=True)
    adapted.loc[0, "status"] = "error"  # left out and counted, not waited for
    both = pd.concat([base, adapted])
    assert complete(both, whole)
    assert complete(both, whole.drop(index=0)), "a failed sample has no margin"
    assert not complete(both, whole.drop(index=1)), "another needs one"
    assert not complete(both, whole.assign(likelihood=whole["likelihood"].where(whole.index != 1)))
    silent = adapted.assign(likelihood=adapted["likelihood"].where(adapted.index != 1))
    assert not complete(pd.concat([base, silent]), whole), "adapted, and not known how likely"
    for part in (base, pd.concat([base, adapted.drop(index=0)]), pd.concat([base, adapted.assign(seed=1)])):
        assert not complete(part, whole)

    profile = load_profile("full").model_dump()
    assert selective.registered(profile, both)
    whole_bfcl = {"benchmarks": counts | {"bfcl": None}}
    for change in ({"k": 2}, {"seeds": [0, 1]}, {"answer_opening": False}, whole_bfcl):
        assert not selective.registered(profile | change, both)
    assert not selective.registered(profile, both.assign(dtype="bfloat16"))
    assert not selective.registered(profile, both.assign(mode="exact"))
    assert not selective.registered(profile, both, selective.SECONDARY), "another model's"


def test_the_secondary_set_is_another_model_on_one_benchmark() -> None:
    asked, (n,) = selective.SECONDARY, selective.SECONDARY.samples.values()
    base = pd.DataFrame({"benchmark": "sealtool", "sample": range(n), "likelihood": 0.5, "seed": 0})
    base = base.assign(
        inference="direct", status="ok", dtype="float32", mode="none", arm="base", adapted=False
    )
    both = pd.concat([base, base.assign(arm=selective.ADAPTED, mode="activated", adapted=True)])
    assert complete(both, base, asked) and not complete(both, base)
    assert selective.attempted(both.drop_duplicates("sample"), base, asked) == {"sealtool": 0}
    full = load_profile("full")
    larger = full.variant("larger").model_dump()
    assert selective.registered(larger, both, asked) and not selective.registered(larger, both)
    assert not selective.registered(full.model_dump(), both, asked)
    assert not selective.registered(larger | {"benchmarks": {"sealtool": 100}}, both, asked)
