"""Tables and figures from made-up records: every number by hand, and nothing silently missing."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from ttsi import figures, statistics, tables
from ttsi.types import Gold, Message, Query, Sample, Tool


def record(sample, correct, arm="base", benchmark="sealtool", **other):
    row = {
        "profile": "cpu", "benchmark": benchmark, "sample": f"{benchmark}-{sample}", "cluster": f"c{sample}",
        "seed": 0, "arm": arm, "inference": "direct", "mode": "none" if arm == "base" else "activated",
        "model": "qwen2.5-coder-0.5b", "tool_order": "shuffled", "correct": correct, "status": "ok",
        "margin": 0.5, "uncertain": arm != "base", "synthesis_failed": False, "copy_ratio": float("nan"),
        "source": "computed",
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


def test_a_row_by_hand():
    table = tables.table1_main(arms([1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]))
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
    assert ",".join(tables.table1_main(arms([1], [1])).columns).startswith(promised)


def test_base_is_never_compared_with_itself():
    table = tables.table1_main(arms([1, 0], [1, 1]))
    assert pd.isna(cell(table, "difference", arm="base"))
    assert pd.isna(cell(table, "uncertain", arm="base"))


def test_machine_failures_are_counted_and_never_scored():
    records = arms([1, 1, 0], [1, 1, 0])
    records.loc[[0, 4], ["status", "correct"]] = ["error", None]
    table = tables.table1_main(records)
    assert cell(table, "errors", arm="base") == 1
    assert cell(table, "n", arm="base") == 2
    assert cell(table, "accuracy", arm="base") == pytest.approx(50)
    assert cell(table, "pairs") == 1  # sample 0 failed under base, sample 1 under tt_si
    assert cell(table, "difference") == 0


def test_only_failures_is_said():
    table = tables.table1_main(arms([None, None], [1, 0]).assign(status=["error", "error", "ok", "ok"]))
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
    table = tables.table1_main(records)
    assert cell(table, "uncertain") == pytest.approx(62.5)
    assert cell(table, "synthesis_failed") == pytest.approx(20)
    assert cell(table, "copies") == pytest.approx(40)


def test_an_answer_that_is_there_twice_is_an_error():
    records = arms([1, 0], [1, 0])
    with pytest.raises(ValueError, match="duplicate"):
        tables.table1_main(pd.concat([records, records.iloc[:1]]))


def test_seeds_are_averaged_per_sample():
    records = pd.concat([arms([1, 0, 0], [1, 1, 0]), arms([0, 0, 0], [1, 0, 0]).assign(seed=1)])
    table = tables.table1_main(records)
    assert cell(table, "n") == 3
    assert cell(table, "seeds") == 2
    assert cell(table, "correct") == pytest.approx(1.5)
    assert cell(table, "difference") == pytest.approx(100 / 3)
    assert cell(table, "mcnemar_p") == "1; 1"


def test_modes_stand_side_by_side_on_the_same_base():
    records = arms([0] * 4, [1, 0, 0, 0])
    exact = records[records["arm"] == "tt_si"].assign(mode="exact", correct=[1, 1, 0, 0])
    table = tables.table1_main(pd.concat([records, exact]))
    assert cell(table, "difference", mode="activated") == pytest.approx(25)
    assert cell(table, "difference", mode="exact") == pytest.approx(50)


def test_tool_orders_are_never_paired_with_each_other():
    records = arms([0] * 4, [1, 0, 0, 0])
    records.loc[records["arm"] == "tt_si", "tool_order"] = "original"
    assert pd.isna(cell(tables.table1_main(records), "difference"))


def test_average_needs_all_three_benchmarks():
    parts = [arms([1, 0, 0, 0], [1, 1, 0, 0], benchmark=b) for b in tables.PAPER_BENCHMARKS]
    assert tables.AVERAGE not in set(tables.table1_main(pd.concat(parts[:2]))["benchmark"])
    table = tables.table1_main(pd.concat(parts))
    assert cell(table, "accuracy", benchmark="avg") == pytest.approx(50)
    assert cell(table, "n", benchmark="avg") == 12
    assert cell(table, "difference", benchmark="avg") == pytest.approx(25)
    assert cell(table, "paper", benchmark="avg") == 65.62
    width = cell(table, "high", benchmark="avg") - cell(table, "low", benchmark="avg")
    assert width == pytest.approx((cell(table, "high") - cell(table, "low")) / np.sqrt(3))


def test_missing_and_not_run_say_so():
    table = tables.table1_main(
        arms([1], [1]), {"nexusraven": "set TTSI_DATA"}, ["sealtool", "nexusraven", "apibank"]
    )
    (missing,) = table[table["benchmark"] == "nexusraven"]["note"]
    assert missing == "missing: set TTSI_DATA"
    absent = table[table["note"] == tables.NOT_RUN]
    assert ("sealtool", "majority", "tt_d") in set(
        zip(absent["benchmark"], absent["inference"], absent["arm"], strict=True)
    )
    assert len(absent[absent["benchmark"] == "apibank"]) == 6
    assert absent["accuracy"].isna().all()
    shown = tables.markdown(tables.table1_view(table))
    assert shown.count("not run in this profile") == len(absent)
    assert "missing: set TTSI_DATA" in shown


def test_nothing_run_is_a_table_of_what_is_absent():
    table = tables.table1_main(pd.DataFrame(), {"bfcl": "get it"}, ["sealtool"])
    assert set(table["note"]) == {tables.NOT_RUN, "missing: get it"}
    assert "Nothing was compared" in tables.table1_reading(table)
    assert figures.main_results_figure(table).get_size_inches()[1] > 0


def test_holm_leaves_the_primary_comparison_alone():
    better = [0] * 10, [1] * 6 + [0] * 4  # exact McNemar: 2 / 2**6
    table = tables.table1_main(
        pd.concat([arms(*better, benchmark=b) for b in ("sealtool", "apibank", "bfcl")])
    )
    assert cell(table, "p") == pytest.approx(0.03125)
    assert pd.isna(cell(table, "p_holm"))
    assert cell(table, "p_holm", benchmark="bfcl") == pytest.approx(0.0625)


def test_caption_and_reading_carry_n_and_discordant_counts():
    table = tables.table1_main(arms([0] * 12, [1] * 9 + [0] * 3))
    assert "n = 12, 9 discordant" in tables.table1_caption(table)
    reading = tables.table1_reading(table)
    assert "+75.0 [" in reading
    assert "9 gained, 0 lost" in reading
    assert "a gain" in reading
    equal = tables.table1_reading(tables.table1_main(arms([0] * 12, [0] * 12)))
    assert "no difference shown" in equal


def test_every_paper_number_averages_to_its_average():
    for numbers in tables.PAPER_TABLE1.values():
        assert np.mean(numbers[:3]) == pytest.approx(numbers[3], abs=0.01)


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


def test_curves_hold_what_statistics_says():
    data = scores()
    curves = tables.estimator_curves(data, [0.5])
    primary = curves[(curves["samples"] == "two or more tools") & (curves["benchmark"] == "sealtool")]
    several = data[data["n_tools"] > 1]
    expected = statistics.rates(several["margin"], several["base_correct"], 0.5)
    (at,) = primary[primary["panel"] == "at_tau"].to_dict("records")
    assert (at["tpr"], at["fpr"], at["j_low"]) == pytest.approx(
        (expected.tpr.value, expected.fpr.value, expected.j.low)
    )
    (area,) = primary[primary["panel"] == "auc"]["auc"]
    assert area == pytest.approx(statistics.auc(several["margin"], several["base_correct"]).value)
    assert len(primary[primary["panel"] == "tau"]) == 101
    assert {"best_out_of_fold", "best_in_sample"} <= set(primary["panel"])
    paper = curves[curves["panel"] == "paper"]
    assert list(paper["tau"]) == [0.35, 0.95]


def test_too_few_is_named_and_the_rest_drawn():
    curves = tables.estimator_curves(pd.concat([scores(), scores(6, "bfcl")]), [0.95])
    few = curves[(curves["panel"] == "too_few") & (curves["samples"] == "two or more tools")]
    assert list(few["benchmark"]) == ["bfcl"]
    assert "10 of each are needed" in few["note"].iloc[0]
    assert "pooled" in set(curves["benchmark"])
    reading = tables.estimator_reading(curves)
    assert "**BFCL**: too few" in reading
    assert "out of fold" in reading
    words = " ".join(t.get_text() for t in figures.figure4_estimator(curves).texts)
    assert "BFCL not drawn, too few" in words.replace("\n", " ")


def test_unscored_samples_are_left_out_of_the_curves():
    data = scores()
    data.loc[1, "margin"] = np.nan
    curves = tables.estimator_curves(data)
    area = curves[(curves["panel"] == "auc") & (curves["samples"] == "all samples")].iloc[0]
    assert area["n_right"] + area["n_wrong"] == 59


def test_nothing_scored_still_makes_a_figure():
    curves = tables.estimator_curves(pd.DataFrame())
    assert list(curves.columns) == tables.CURVE_COLUMNS
    assert "Nothing was scored" in tables.estimator_reading(curves)
    assert figures.figure4_estimator(curves).get_size_inches()[1] > 0


# --- the data -------------------------------------------------------------------------------------------


def sample(index, tools, gold, flags=()):
    listed = tuple(Tool(name, "", {"type": "object"}) for name in tools)
    query = Query(f"s-{index}", "s", (Message("user", "?"),), listed)
    return Sample(query, tuple(Gold(g, {}) for g in gold), frozenset(flags), cluster=f"c{index // 2}")


def test_data_counts_by_hand():
    group = [
        sample(0, ["a", "b"], ["a"]), sample(1, ["a", "b"], ["b"], ["duplicate"]),
        sample(2, ["a"], ["a"]), sample(3, ["a", "b", "c"], ["c", "a"], ["duplicate"]),
    ]  # fmt: skip
    (row,) = tables.data_counts({"s": group}).to_dict("records")
    assert (row["samples"], row["tools_min"], row["tools_median"], row["tools_max"]) == (4, 1, 2, 3)
    assert (row["one_tool"], row["several_calls"], row["clusters"], row["flags"]) == (1, 1, 2, "duplicate 2")
    (row,) = tables.gold_positions({"shuffled": {"s": group}}).to_dict("records")
    assert (row["n"], row["first"]) == (3, 1)
    assert row["chance"] == pytest.approx(1 / 2 + 1 / 2 + 1 / 3)


# --- writing --------------------------------------------------------------------------------------------


def test_model_text_cannot_break_a_table_or_be_html():
    shown = tables.markdown(pd.DataFrame({"reply": ["<script>a|b</script>\nc"]}))
    assert shown.splitlines()[2] == "| &lt;script&gt;a\\|b&lt;/script&gt; c |"
    assert "<script" not in tables.quote("<script>alert(1)</script>")


def test_saved_files_are_complete_stable_and_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    table = tables.table1_main(arms([1, 0, 0], [1, 1, 0]))
    path = tables.save_table(table, "table1_main", "cpu", "the caption", tables.table1_view(table))
    first = path.read_bytes()
    assert path == tmp_path / "cpu" / "table1_main.csv"
    assert tables.save_table(table, "table1_main", "cpu").read_bytes() == first
    back = pd.read_csv(io.BytesIO(first))
    assert cell(back, "correct") == 2
    assert cell(back, "accuracy") == pytest.approx(66.6667, abs=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == ["table1_main.csv", "table1_main.md"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tables.write(tmp_path / "table.csv", b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        tables.write(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def every_figure():
    curves = tables.estimator_curves(scores(), [0.95])
    table = tables.table1_main(arms([0] * 12, [1] * 3 + [0] * 9))
    positions = tables.gold_positions({"shuffled": {"s": [sample(0, ["a", "b"], ["a"])]}})
    return {
        "estimator": (figures.figure4_estimator(curves), curves),
        "margins": (figures.margins_figure(scores()), scores()),
        "main": (figures.main_results_figure(table), table),
        "gold": (figures.gold_first_figure(positions), positions),
    }


def test_figures_are_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSI_FIGURES", str(tmp_path))
    for turn in ("one", "two"):
        for name, (figure, values) in every_figure().items():
            figures.save_figure(figure, values, name, turn)
    one = sorted((tmp_path / "one").iterdir())
    assert {p.suffix for p in one} == {".csv", ".pdf", ".png"}
    assert len(one) == 12
    for path in one:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.stat().st_size > 50


def test_figures_leave_the_callers_style_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    every_figure()
    assert dict(mpl.rcParams) == before


def test_every_arm_has_its_own_colour():
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)
    assert set(tables.ARMS) <= set(figures.COLOURS)
