"""L2 and L3: by hand, blind to parts of their set, and in notebook 09 beside the run without a sentence."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from cells import played, whole
from scipy import stats
from test_beside_a_grammar import answers

from study.analysis import selective, sentence, statistics
from study.run import frames
from study.run.config import load_profile

SMALL, LARGE = selective.PRIMARY.model, selective.SECONDARY.model
ARMS = ["base", "constrained", "tt_si_selective_constrained"]
WITHOUT = {"base": "0000", "constrained": "0011", "tt_si_selective_constrained": "0111"}
WITH = {"base": "0001", "constrained": "1110", "tt_si_selective_constrained": "1111"}


def run(right: dict[str, str], n: int = 294, **of: Any) -> pd.DataFrame:
    """A run's records, each arm's verdicts repeated over n samples."""
    told = {"benchmark": "sealtool", "dtype": "float32", "code": "ok", "tool_order": "shuffled"} | of
    made = [answers(arm, (x * n)[:n], **told) for arm, x in right.items()]
    return whole(pd.concat(made, ignore_index=True), frames.RECORDS)


def test_the_hypotheses_by_hand() -> None:
    records = {m: sentence.beside(run(WITH, model=m), run(WITHOUT, model=m)) for m in (SMALL, LARGE)}
    found = sentence.hypotheses({m: (rows, sentence.SETS[m]) for m, rows in records.items()})
    assert found["hypothesis"].tolist() == ["L2", "L3"] * 2 and (found["n"] == 294).all()
    assert found["model"].tolist() == [SMALL] * 2 + [LARGE] * 2
    assert found["gained"].tolist() == [148, 73] * 2 and found["lost"].tolist() == [73, 0] * 2
    assert found["value"].tolist() == pytest.approx([100 * 75 / 294, 100 * 73 / 294] * 2)
    p = [stats.binomtest(73, 221).pvalue, stats.binomtest(0, 73).pvalue] * 2
    assert found["p"].tolist() == pytest.approx(p)
    holm = statistics.holm(dict(enumerate(p)))
    assert found["p_holm"].tolist() == pytest.approx([holm[i] for i in range(4)]), "over both models"
    one = {SMALL: (records[SMALL], sentence.SETS[SMALL])}
    assert sentence.hypotheses(one).empty, "half a set"


def test_a_run_stands_beside_the_same_without_its_sentence() -> None:
    own = {"instructions": "Mind the gap."}
    variants = {
        "larger": {"model": LARGE, "arms": ["base"], "benchmarks": {"sealtool": 3}},
        "told": {"arms": ["base"], **own},
        "told_larger": {"model": LARGE, "benchmarks": ["sealtool"], **own},
        "told_k2": {"k": 2, **own},
    }
    assert sentence.untold(variants) == {"told": "", "told_larger": "larger"}
    full = load_profile("full")
    assert sentence.untold(full.variants) == {"told": "", "larger_told": "larger"}
    for variant in sentence.untold(full.variants):
        told = full.variant(variant)
        asked = sentence.SETS[told.model]
        assert selective.registered(told.model_dump(), run(WITH, model=told.model), asked)
        assert not selective.registered(told.model_dump(), run(WITH), selective.SECONDARY)


def test_a_row_is_paired_with_the_same_arm_without() -> None:
    many = run(WITHOUT, 4, code=["extra_argument", "ok", "extra_argument", "ok"])
    few = run(WITH, 4, code=["extra_argument", "ok", "ok", "ok"]).query("sample != 's3'")
    found = sentence.table(sentence.beside(few, many), [*ARMS, "oracle"]).set_index("name")
    assert found.index.tolist() == ARMS
    row = found.loc["constrained"]
    assert (row["pairs"], row["gained"], row["lost"]) == (3, 2, 0)
    assert (row["accuracy"], row["untold_accuracy"]) == (100, 50)
    assert (row["extra"], row["untold_extra"]) == pytest.approx((100 / 3, 50))


def told(answered: int) -> dict[str, Any]:
    """Notebook 09 over all samples of both models, `answered` of the larger one's with the sentence."""
    full = load_profile("full").variants
    variants = {v: full[v] | {"benchmarks": {"sealtool": None}} for v in ("larger", "told", "larger_told")}
    parts = [run(WITHOUT, model=SMALL, variant=""), run(WITH, model=SMALL, variant="told"),
             run(WITHOUT, model=LARGE, variant="larger"),
             run(WITH, answered, model=LARGE, variant="larger_told")]  # fmt: skip
    records = pd.concat(parts).assign(adapted=False)
    return played("09", records, study={"variants": variants, "benchmarks": {"sealtool": None}})


def test_the_set_is_tested_when_both_models_have_all() -> None:
    found = told(294)
    assert found["waits"] == [] and found["tests"]["gained"].tolist() == [148, 73] * 2
    assert found["told"]["arm"].tolist() == ARMS * 2
    assert "**L2, 0.5B**: constrained − untold constrained +25.5" in found["said"]
    assert not {"told", "larger_told"} & set(found["table"]["variant"]), "no rows among the controls"


@pytest.mark.parametrize("answered", [293, 0])
def test_of_a_part_of_the_set_nothing_is_said(answered: int) -> None:
    found = told(answered)
    assert (
        found["tests"].empty and found["told"].empty and "L2" not in found["said"].split("What it says")[-1]
    )
    assert found["waits"] == [f"1.5B {answered} of 294"]
