"""G1 to G3: by hand, blind to parts of a set, and told apart in notebook 11."""

from __future__ import annotations

from math import isnan
from typing import Any

import pandas as pd
import pytest
from cells import played
from scipy import stats

from study.analysis import constrained, selective
from study.analysis.answers import Answers
from study.analysis.selective import Asked

THREE = Asked("m", {"b": 6})
ARMS = constrained.arms(constrained.GRAMMAR)
VERDICTS = {
    "base": "000111",
    "constrained": "110111",
    "tt_si_selective": "101011",
    "tt_si_selective_constrained": "111111",
}


def answers(arm: str, right: str, failed: int | None = None, **of: Any) -> pd.DataFrame:
    """Records of an arm; the sample `failed` is one that the machine failed at."""
    n = len(right)
    return pd.DataFrame({
        "benchmark": "b", "sample": [f"s{i}" for i in range(n)], "seed": 0, "arm": arm,
        "mode": "activated" if arm.startswith("tt") else "none", "inference": "direct",
        "status": ["error" if i == failed else "ok" for i in range(n)],
        "cluster": [f"c{i}" for i in range(n)], "correct": [x == "1" for x in right],
    }).assign(**of)  # fmt: skip


def four(failed: int | None = None) -> pd.DataFrame:
    return pd.concat([answers(a, r, failed if a == "constrained" else None) for a, r in VERDICTS.items()])


def test_the_hypotheses_by_hand() -> None:
    found = constrained.hypotheses(constrained.verdicts(four(), THREE)).set_index("hypothesis")
    assert found["gained"].tolist() == [2, 1, 1] and found["lost"].tolist() == [0, 2, 0]
    assert found["value"].tolist() == pytest.approx([200 / 6, -100 / 6, 100 / 6])
    assert found["p"].tolist() == pytest.approx(
        [stats.binomtest(0, 2).pvalue, stats.binomtest(1, 3).pvalue, 1]
    )
    assert (found["p_holm"] == 1).all() and (found["n"] == 6).all()


def test_an_effect_holds_and_its_opposite_is_told() -> None:
    more = {"base": "0" * 40, "constrained": "1" * 20 + "0" * 20, "tt_si_selective": "1" * 5 + "0" * 35,
            "tt_si_selective_constrained": "1" * 40}  # fmt: skip
    records = pd.concat([answers(a, r) for a, r in more.items()])
    found = constrained.hypotheses(constrained.verdicts(records, Asked("m", {"b": 40})))
    assert [selective.outcome(r) for r in found.to_dict("records")] == [
        "holds",
        "the opposite holds",
        "holds",
    ]
    assert (found["cluster_low"] < found["value"]).all() and (found["clusters"] == 40).all()


def test_elsewhere_one_hypothesis_is_tested() -> None:
    asked = constrained.SETS["elsewhere"]
    assert asked == selective.REPLICATION and sum(asked.samples.values()) == 564
    arms = ("constrained", "tt_si_selective_constrained")
    parts = [answers(a, (VERDICTS[a] * 25)[:n], benchmark=b) for b, n in asked.samples.items() for a in arms]
    records = pd.concat(parts)
    assert constrained.attempted(records, pd.DataFrame(), asked) == asked.samples, "base is not asked for"
    found = constrained.hypotheses(constrained.verdicts(records, asked))
    assert found["hypothesis"].tolist() == ["L1"] and found["n"].tolist() == [564]
    assert found["gained"].tolist() == [94] and (found["p_holm"] == found["p"]).all()


def test_a_failure_of_the_machine_is_left_out_and_counted() -> None:
    records = four(failed=2)
    assert constrained.attempted(records, pd.DataFrame(), THREE) == {"b": 6}
    assert constrained.failures(records, THREE) == 1
    assert "s2" not in set(constrained.verdicts(records, THREE)["sample"])


@pytest.mark.parametrize(("failed", "mended"), [(None, (1, 2)), (0, (0, 1)), (2, (1, 1))])
def test_which_gains_the_grammar_has_too(failed: int | None, mended: tuple[int, int]) -> None:
    found = {arm: Answers(four(failed), arm) for arm in ARMS}
    assert constrained.mended(found, "tt_si_selective") == mended
    assert all(map(isnan, constrained.mended(found, "constrained")))


def test_what_an_arm_mends_is_named_by_what_the_grammar_gets_wrong() -> None:
    wrong = {"base": ["bad_json", "unknown_tool", "extra_argument", "", "", ""],
             "constrained": ["", "", "extra_argument", "", "", ""],
             "tt_si_selective": ["", "extra_argument", "", "extra_argument", "", ""]}  # fmt: skip
    records = four()
    coded = {arm: [code or "ok" for code in codes] for arm, codes in wrong.items()}
    found = {arm: Answers(records[records["arm"] == arm].assign(code=coded[arm])) for arm in wrong}
    told = {arm: constrained.beside(found, arm) for arm in wrong}
    assert {arm: t["mends"] for arm, t in told.items()} == {
        "base": "", "constrained": "1 bad_json, 1 unknown_tool", "tt_si_selective": "1 extra_argument"
    }  # fmt: skip
    assert [t["extra"] for t in told.values()] == pytest.approx([100 / 6, 100 / 6, 200 / 6])
    assert (told["tt_si_selective"]["mended"], told["tt_si_selective"]["gains"]) == (1, 2)


@pytest.mark.parametrize("arm", ARMS)
def test_a_sample_counts_when_all_four_have_answered(arm: str) -> None:
    records = four()
    lacking = records[(records["arm"] != arm) | (records["sample"] != "s0")]
    assert constrained.attempted(lacking, pd.DataFrame(), THREE) == {"b": 5}
    assert constrained.attempted(lacking, pd.DataFrame(), Asked("m", {"other": 3})) == {"other": 0}


def run_of(answered: int) -> dict[str, Any]:
    """Notebook 11 over 40 samples of the 0.5B and 294 of the 1.5B, `answered` of them under the grammar."""
    parts = []
    for n, of in ((40, {"model": "qwen2.5-coder-0.5b", "variant": ""}), (294, SECOND)):
        for arm, right in VERDICTS.items():
            made = answers(arm, (right * 49)[:n], benchmark="sealtool", dtype="float32", n_tools=3, **of)
            parts.append(made[:answered] if n == 294 and arm.endswith("constrained") else made)
    records = pd.concat(parts)
    told = {"likelihood": 0.4, "adapted": records["arm"].str.startswith("tt"), "code": "ok", "margin": 0.5}
    records = records.assign(**told)
    profile = {"benchmarks": {"sealtool": None}, "answer_opening": True, "modes": {"default": ["activated"]},
               "variants": {"larger": {"model": SECOND["model"]}},
               "scores": records[records["arm"] == "base"]}  # fmt: skip
    return played("11", records, "", profile)


SECOND = {"model": selective.SECONDARY.model, "variant": "larger"}


def test_a_set_is_tested_once_when_it_is_whole() -> None:
    found = run_of(294)
    assert found["grammar"]["set"].tolist() == ["confirmatory: the secondary set"] * 3
    assert found["grammar"]["gained"].tolist() == [98, 49, 49] and found["waits"] == []
    assert "the secondary set**, G1: constrained − base" in found["said"]
    assert found["table"].groupby("model").size().tolist() == [4, 4]


@pytest.mark.parametrize("answered", [293, 0])
def test_of_a_part_of_a_set_nothing_is_said(answered: int) -> None:
    found = run_of(answered)
    assert found["grammar"].empty and found["waits"] == [f"SealTool, 1.5B {answered} of 294"]
    assert set(found["table"]["model"]) == {"qwen2.5-coder-0.5b"}, "exploratory, and stays"
