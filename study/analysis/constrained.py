"""What a grammar leaves to test-time training: G1 to G3 of docs/hypotheses.md, over answers of four arms."""

from __future__ import annotations

from typing import Any

import pandas as pd

from study.analysis import selective, statistics
from study.analysis.selective import Asked
from study.analysis.statistics import Places

SETS = {"primary": selective.PRIMARY, "secondary": selective.SECONDARY}
"""The sets that G1 to G3 are tested on."""
RIVALS = {
    "G1": ("base", "constrained"),
    "G2": ("constrained", "tt_si_selective"),
    "G3": ("constrained", "tt_si_selective_constrained"),
}
"""By hypothesis: the arm that the other is compared with, and the other."""
ARMS = ["base", "constrained", "tt_si_selective", "tt_si_selective_constrained"]


def attempted(records: pd.DataFrame, scores: pd.DataFrame, asked: Asked) -> dict[str, int]:
    """By benchmark of the set: samples with an outcome of all four arms, machine failures among them.

    scores: not needed; `selective.attempted` takes them.
    """
    rows = _of(records, asked)
    whole = rows.groupby(["benchmark", "sample"])["arm"].nunique() == len(ARMS)
    found = whole[whole].groupby("benchmark").size()
    return {name: int(found.get(name, 0)) for name in asked.samples}


def verdicts(records: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """One row per sample of the set that the machine failed at in none of the arms: by arm, right or not."""
    rows = _of(records, asked)
    order = rows.loc[rows["arm"] == "base", ["benchmark", "sample", "cluster"]]
    right = rows[rows["status"] == "ok"].pivot(index=["benchmark", "sample"], columns="arm", values="correct")
    table = order.merge(right.reindex(columns=ARMS).dropna().astype(bool), on=["benchmark", "sample"])
    return table.reset_index(drop=True)


def failures(records: pd.DataFrame, asked: Asked) -> int:
    """Samples of the set that the machine failed at in one arm or more."""
    rows = _of(records, asked)
    return len(rows.loc[rows["status"] == "error", ["benchmark", "sample"]].drop_duplicates())


def _of(records: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """Direct answers of the four arms on a set, one per sample and arm."""
    rows = records[records["benchmark"].isin(asked.samples) & records["arm"].isin(ARMS)]
    return rows[(rows["inference"] == "direct") & (rows["seed"] == selective.REGISTERED["seeds"][0])]


def hypotheses(table: pd.DataFrame) -> pd.DataFrame:
    """G1 to G3 over rows of `verdicts`: points, above 0 if the second arm is better; `p_holm` over the three.

    Exact McNemar, two-sided; paired intervals, and those over clusters where there are enough.
    """
    rows = table.reset_index(drop=True)
    out = pd.DataFrame([_against(rows, name, *of) for name, of in RIVALS.items()])
    out["p_holm"] = out.index.map(statistics.holm(out["p"].to_dict()))
    return out


def _against(rows: pd.DataFrame, name: str, reference: str, arm: str) -> dict[str, Any]:
    paired = statistics.paired(rows[reference], rows[arm])
    gain = 100 * (rows[arm].astype(float) - rows[reference].astype(float)).to_numpy()

    def value(drawn: Places) -> float:
        return float(gain[drawn].mean())

    said = {"hypothesis": name, "what": f"{arm} − {reference}", "p": paired.p}
    said |= selective.cells(paired.difference, 100) | {"gained": paired.gained, "lost": paired.lost}
    return said | selective.over_clusters(rows, value)
