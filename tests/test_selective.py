"""Selective TT-SI judged: by hand, against other ways to the same number, and blind where it must be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cells import played
from scipy import stats

from study.analysis import acceptance, detection, selective
from study.analysis.statistics import TooFew


def rows(arm: str, mode: str, q: list[float], right: list[int | None], margin: float = 0.5) -> pd.DataFrame:
    """Records of an arm; None = no adapted answer, the base answer stands."""
    n = len(q)
    return pd.DataFrame({
        "benchmark": "b", "sample": [f"s{i}" for i in range(n)], "seed": 0, "arm": arm, "mode": mode,
        "inference": "direct", "status": "ok", "cluster": [f"c{i}" for i in range(n)], "n_tools": 3,
        "likelihood": q, "correct": [bool(x) for x in right], "code": "ok", "margin": margin,
        "adapted": [x is not None and arm != "base" for x in right],
        "seconds_h": 1.0, "seconds_g": 10.0, "seconds_t": 100.0, "seconds_answer": 1000.0,
    })  # fmt: skip


BASE = rows("base", "none", [0.9, 0.4, 0.3, 0.2, 0.1, 0.45], [1, 1, 0, 0, 1, 0])
ALL = rows("tt_si_all", "activated", [0.95, 0.3, 0.6, 0.1, 0.5, 0.4], [1, 0, 1, 1, 0, None])


def test_which_answer_stands_by_hand() -> None:
    table = selective.pairs(pd.concat([BASE, ALL]))
    assert table["right"].tolist() == [True, True, False, False, True, False]
    assert table["adapted_right"].isna().tolist() == [False] * 5 + [True], "nothing to accept"
    assert np.isnan(table["adapted_q"].iloc[5])
    always = selective.chosen(table, table["q"] < 0.5, surer=False)
    assert always.tolist() == [True, False, True, True, False, False]
    surer = selective.chosen(table, table["q"] < 0.5, surer=True)
    assert surer.tolist() == [True, True, True, False, False, False], "s1, s3 refused; s2, s4 accepted"
    assert selective.chosen(table, False, surer=False).tolist() == table["right"].tolist()


def test_the_hypotheses_by_hand() -> None:
    found = selective.hypotheses(selective.pairs(pd.concat([BASE, ALL]))).set_index("hypothesis")
    assert found.loc["H1", ["p", "n", "of"]].tolist() == [1, 0, ""], "too few answers for an AUC"
    assert (found.loc["H2", ["gained", "lost"]] == [1, 1]).all() and found.loc["H2", "p"] == 1
    assert found.loc["H2", "value"] == 0 and found.loc["H2", "n"] == 6
    kept = ["gains_kept", "gains_refused", "losses_kept", "losses_refused"]
    assert found.loc["H3", kept].tolist() == [1, 1, 1, 1] and found.loc["H3", "p"] == 1
    assert (found["p_holm"] == 1).all()


@pytest.mark.parametrize(
    ("hypothesis", "value", "p_holm", "says"),
    [
        ("H1", 3.0, 0.049, "holds"),
        ("H1", 3.0, 0.05, "not shown"),
        ("H2", -3.0, 0.01, "the opposite holds"),
        ("H3", 0.5, 0.01, "the opposite holds"),
        ("H3", 2.0, 0.01, "holds"),
        ("H5", 60.0, 0.01, "holds"),
        ("H5", 40.0, 0.01, "the opposite holds"),
        ("H2", 3.0, float("nan"), ""),
    ],
)
def test_what_a_test_says(hypothesis: str, value: float, p_holm: float, says: str) -> None:
    assert selective.outcome({"hypothesis": hypothesis, "value": value, "p_holm": p_holm}) == says


def test_how_much_likelier_by_hand() -> None:
    """q′ / q of the four verdicts that change where q < ½: lost .75, gained 2 and .5, lost 5."""
    table = selective.pairs(pd.concat([BASE, ALL]))
    swept = acceptance.by_factor(table, [0, 0.4, 1, 2, 6]).set_index("factor")
    assert swept["gained"].tolist() == [2, 2, 1, 0, 0], "q′ = 2q isn't more than twice as likely"
    assert swept["lost"].tolist() == [2, 2, 1, 1, 0]
    found = acceptance.hypotheses(table).set_index("hypothesis")
    assert found.loc["H4", ["gained", "lost", "n"]].tolist() == [0, 1, 6]
    assert found.loc["H5", ["gained", "lost", "n", "value"]].tolist() == [2, 2, 4, 25.0]
    assert found["p_holm"].tolist()[:2] == [1, 1] and found["p"].isna().tolist() == [False, False, True]
    unread = table.assign(q=table["q"].where(table.index != 2, 0))
    assert acceptance.hypotheses(unread).set_index("hypothesis").loc["H5", "value"] == 50, "0 → .6: the most"


def test_a_factor_that_tells_gains_from_losses_is_found() -> None:
    table = many().assign(q=lambda t: t["q"].clip(0.01))
    gain = table["adapted_right"].astype(bool) & ~table["right"]
    apart = table.assign(adapted_q=table["q"] * np.where(gain, 4, 1.2))
    found = acceptance.hypotheses(apart).set_index("hypothesis")
    assert found.loc["H4", "lost"] == 0 and found.loc["H4", "gained"] == (gain & (apart["q"] < 0.5)).sum()
    assert found.loc["H5", "value"] == 100 and (found.loc[["H4", "H5"], "p_holm"] < 0.01).all()
    alike = table.assign(adapted_q=table["q"] * (1 + np.random.default_rng(0).random(len(table))))
    blind = acceptance.hypotheses(alike).set_index("hypothesis").loc["H5"]
    assert 35 < blind["value"] < 65 and blind["p"] > 0.05 and blind["value_low"] < 50 < blind["value_high"]


def test_adapting_where_q_is_small_is_all_that_the_hypotheses_ask() -> None:
    """Answers of samples that are certain by q change nothing, and the margin may come from the scores."""
    unsure = BASE["likelihood"] < 0.5
    some = ALL.assign(arm=selective.ADAPTED, margin=float("nan"), adapted=ALL["adapted"] & unsure)
    some["correct"] = some["correct"].where(unsure, BASE["correct"])
    scores = BASE[[*selective.KEYS]].assign(margin=0.5)
    few = selective.pairs(pd.concat([BASE, some]), selective.ADAPTED, scores=scores)
    full = selective.pairs(pd.concat([BASE, ALL]))
    assert few["margin"].tolist() == full["margin"].tolist()
    assert few["adapted_right"].isna().tolist() == [True] + [False] * 4 + [True], "s0 is certain"
    pd.testing.assert_frame_equal(selective.hypotheses(few), selective.hypotheses(full))

    judged = selective.rules(few, full, tau=0.95)
    assert judged["q < ½"]["correct"].tolist() == [True, False, True, True, False, False]
    assert judged["q < ½, surer"]["correct"].tolist() == [True, True, True, False, False, False]
    base, h, more, unmade = 1000, 1, 1110, 110
    assert judged["q < ½"]["took"].tolist() == [base] + [base + more] * 4 + [base + unmade]
    assert judged["margin < 0.95"]["took"].tolist() == [base + h + more] * 5 + [base + h + unmade]
    assert judged["q < ½, surer"]["asked"].tolist() == unsure.tolist() and judged["all"]["asked"].all()
    assert judged["all"]["correct"].equals(judged["margin < 0.95"]["correct"]), "all margins are 0.5"
    assert len(selective.rules(few, full.head(2))["all"]) == 2, "judged where all were adapted"
    more_rows = selective.rules(few, full.head(2), by_margin=full.head(4))
    assert [len(more_rows[r]) for r in ("all", "margin < 0.95, surer", "q < ½")] == [2, 4, 6]


def test_the_first_look_is_left_out_by_the_order_of_the_run() -> None:
    n = selective.SEEN["toolalpaca"] + 2
    records = pd.DataFrame({"benchmark": "toolalpaca", "sample": range(n), "arm": "base"})
    other = pd.DataFrame({"benchmark": "sealtool", "sample": [0], "arm": "base"})
    table = pd.concat([records, other])
    left = selective.unseen(table.drop(index=n - 1), pd.concat([records, other, records.assign(arm="x")]))
    assert left[["benchmark", "sample"]].values.tolist() == [["toolalpaca", n - 2], ["sealtool", 0]]


def many(n: int = 400) -> pd.DataFrame:
    """Judged samples of two benchmarks in clusters of two, drawn so that all three hypotheses hold."""
    rng = np.random.default_rng(5)
    right = rng.random(n) < 0.5
    q = np.clip(rng.normal(0.25 + 0.2 * right, 0.12), 0, 1)
    after = np.where(rng.random(n) < 0.25, ~right, right)
    surer = np.where(after & ~right, 0.2, np.where(after == right, 0, -0.1)) + rng.normal(0, 0.12, n)
    return pd.DataFrame({
        "benchmark": np.where(np.arange(n) < n // 2, "b", "c"), "cluster": np.arange(n) // 2, "n_tools": 3,
        "q": q, "margin": rng.random(n), "right": right,
        "adapted_right": pd.array(after, "boolean"), "adapted_q": q + surer,
    })  # fmt: skip


def test_the_interval_over_clusters_lies_about_the_value() -> None:
    table = many()
    found = selective.hypotheses(table).set_index("hypothesis")
    assert (found["clusters"] == 200).all() and found.loc["H1", "of"] == "b, c"
    inside = (found["cluster_low"] < found["value"]) & (found["value"] < found["cluster_high"])
    assert inside.all() and (found["p_holm"] < 0.01).all()
    ordinary = found["value_high"] - found["value_low"]
    ratio = (found["cluster_high"] - found["cluster_low"]) / ordinary
    assert ratio[["H1", "H2"]].between(0.7, 1.4).all(), "pairs that have nothing in common"
    for row in found.reset_index().to_dict("records"):
        assert selective.outcome(row) == "holds"


def test_a_benchmark_without_variance_does_not_outweigh_the_others() -> None:
    table = many()
    perfect = table[table["benchmark"] == "c"].assign(q=lambda t: t["right"] * 0.9, margin=lambda t: t["q"])
    found = selective.hypotheses(pd.concat([table[table["benchmark"] == "b"], perfect])).iloc[0]
    assert found["of"] == "b" and found["n"] == 200 and found["value"] > 10


def test_q_is_the_scores_where_a_record_has_none() -> None:
    base = BASE.assign(likelihood=BASE["likelihood"].where(BASE.index != 1))
    scores = BASE[[*selective.KEYS, "margin", "likelihood"]]
    both = pd.concat([base, ALL])
    assert selective.pairs(both)["q"].isna().sum() == 1
    whole = selective.pairs(pd.concat([BASE, ALL]))
    pd.testing.assert_frame_equal(selective.pairs(both, scores=scores), whole, check_like=True)


def test_a_failure_of_the_machine_is_no_answer() -> None:
    failed = ALL.assign(status=["ok", "error", *["ok"] * 4])
    assert "s1" not in set(selective.pairs(pd.concat([BASE, failed]))["sample"])


SECOND = {"model": selective.SECONDARY.model, "variant": "larger"}


def run_of(seconds: int, **change: Any) -> dict[str, Any]:
    """Notebook 11 over 40 samples of one model and `seconds` of the larger one, as far as its words."""
    rng, parts, known = np.random.default_rng(7), [], []
    for n, of in ((40, {"model": "qwen2.5-coder-0.5b", "variant": ""}), (seconds, SECOND)):
        q, right = rng.random(n), (rng.random(n) < 0.5).astype(int)
        after = [int(x) if p < 0.5 else None for x, p in zip(rng.random(n) < 0.5, q, strict=True)]
        base = rows("base", "none", q.tolist(), right.tolist())
        adapted = rows(selective.ADAPTED, "activated", rng.random(n).tolist(), after)
        both = pd.concat([base, adapted]).assign(benchmark="sealtool", dtype="float32", **of)
        parts, known = [*parts, both], [*known, both[both["arm"] == "base"]]
    profile = {"benchmarks": {"sealtool": None}, "answer_opening": True, "modes": {"default": ["activated"]},
               "variants": {"larger": {"model": SECOND["model"]}}, "scores": pd.concat(known)}  # fmt: skip
    return played("11", pd.concat(parts), "", profile | change)


def test_a_set_is_tested_once_when_it_is_whole() -> None:
    found = run_of(294)
    assert list(found["complete"]) == ["secondary"] and found["lacking"] == []
    seen = (("tests", "H1", 3, "exploratory: SealTool"), ("more", "H4", 2, "described: SealTool"))
    for name, first, count, other in seen:
        table = found[name]
        sure = table[table["set"] == "confirmatory: the secondary set"]
        assert sure["hypothesis"].iloc[0] == first and sure["p_holm"].notna().sum() == count
        assert set(table["set"]) == {"confirmatory: the secondary set", other}
    assert found["more"].set_index("set").loc["described: SealTool", "p"].isna().all(), "found there"
    assert "the secondary set**, H4" in found["said"]


@pytest.mark.parametrize("seconds", [293, 0])
def test_of_a_part_of_a_set_nothing_is_said(seconds: int) -> None:
    found = run_of(seconds)
    assert found["complete"] == {} and set(found["answered"]["model"]) == {"qwen2.5-coder-0.5b"}
    assert found["lacking"] == ([f"SealTool, 1.5B {seconds} of 294"] if seconds else [])
    assert set(found["tests"]["set"]) == {"exploratory: SealTool"} and list(found["groups"]) == ["SealTool"]
    assert ("1.5B" in found["said"]) == bool(seconds)


def test_another_run_of_the_larger_model_is_not_the_set() -> None:
    found = run_of(294, k=2)
    assert found["complete"] == {} and found["lacking"] == [] and len(found["runs"]) == 1


def test_notebook_11_without_rows() -> None:
    assert "Nothing: no likelihood" in played("11", pd.DataFrame())["said"]


def scores(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.4
    first, second = rng.normal(right, 1), rng.normal(0.5 * right, 1).round(1)
    return first, second, right


def test_delong_is_the_difference_of_the_areas() -> None:
    first, second, right = scores(0)
    found = detection.delong(first, second, right)
    areas = [detection.auc(x, right).value for x in (first, second)]
    assert found.value == pytest.approx(areas[0] - areas[1])
    back = detection.delong(second, first, right)
    assert (back.value, back.low) == pytest.approx((-found.value, -found.high))
    same = detection.delong(first, 3 * first + 1, right)
    assert same.value == same.low == same.high == 0, "an area knows order alone"


def test_delongs_variance_by_its_definition() -> None:
    """Sums over pairs, written out: the variance of V10 over the right, of V01 over the wrong answers."""
    first, second, right = scores(1, 40)

    def psi(x: np.ndarray, i: int, j: int) -> float:
        return 1.0 if x[i] > x[j] else 0.5 if x[i] == x[j] else 0.0

    yes, no = np.flatnonzero(right), np.flatnonzero(~right)
    d = {(i, j): psi(first, i, j) - psi(second, i, j) for i, j in itertools.product(yes, no)}
    v10 = [np.mean([d[i, j] for j in no]) for i in yes]
    v01 = [np.mean([d[i, j] for i in yes]) for j in no]
    se = np.sqrt(np.var(v10, ddof=1) / len(yes) + np.var(v01, ddof=1) / len(no))
    found = detection.delong(first, second, right)
    assert (found.high - found.low) / 2 == pytest.approx(stats.norm.ppf(0.975) * se)


def test_delong_holds_its_level() -> None:
    """Two scores that know alike: p < .05 in some 5 % of draws."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        right = rng.random(80) < 0.5
        shared = rng.normal(right, 1)
        pair = (shared + rng.normal(0, 1, 80) for _ in range(2))
        hits += detection.pooled([detection.delong(*pair, right)])[1] < 0.05
    assert 0.02 < hits / 400 < 0.09


def test_pooling_weighs_by_precision() -> None:
    first, second, right = scores(3)
    one = detection.delong(first, second, right)
    both, _ = detection.pooled([one, one])
    assert both.value == pytest.approx(one.value) and both.n == 2 * one.n
    assert both.high - both.low == pytest.approx((one.high - one.low) / np.sqrt(2))


def test_too_few_is_said() -> None:
    with pytest.raises(TooFew, match="2 right"):
        detection.delong([1, 2, 3], [1, 2, 3], [True, True, False])


def test_reliability_and_risk_by_hand() -> None:
    q = pd.Series([0.05, 0.06, 0.95, 1.0])
    right = pd.Series([False, True, True, True])
    bins = selective.reliability(q, right)
    assert bins["bin"].tolist() == [0, 9] and bins["n"].tolist() == [2, 2]
    assert bins["right"].tolist() == [0.5, 1.0] and bins["q"].tolist() == pytest.approx([0.055, 0.975])
    curve = selective.risk_coverage(pd.Series([0.9, 0.9, 0.1, 0.5]), pd.Series([True, False, False, True]))
    assert curve["coverage"].tolist() == [0.5, 0.75, 1.0], "ties go together"
    assert curve["risk"].tolist() == pytest.approx([0.5, 1 / 3, 0.5])
