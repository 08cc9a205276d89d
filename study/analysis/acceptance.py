"""Which adapted answers stand: what acceptance keeps and refuses, and how much likelier it should ask for.

Frames are of `selective.pairs`: a row per sample, q and q′ the likelihoods of its base and adapted answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from study.analysis import selective, statistics
from study.analysis.detection import auc, delong
from study.analysis.statistics import Places, TooFew

FACTOR = 2.0
"""How many times likelier the adapted answer has to be in H4 of docs/hypotheses.md: one bit."""
ACCEPTED = ["n", "accepted", "gained", "lost", "gains_refused", "losses_refused"]


def acceptance(table: pd.DataFrame) -> dict[str, int]:
    """`ACCEPTED`: adapted answers, those that are likelier, and the verdicts that change with either."""
    tried = table[table["adapted_right"].notna() & table["q"].notna() & table["adapted_q"].notna()]
    kept = tried["adapted_q"] > tried["q"]
    now = tried["adapted_right"].astype(bool)
    gain, loss = now & ~tried["right"], ~now & tried["right"]
    counts = (kept, gain & kept, loss & kept, gain & ~kept, loss & ~kept)
    return dict(zip(ACCEPTED, (len(tried), *(int(c.sum()) for c in counts)), strict=True))


def by_factor(table: pd.DataFrame, factors: Sequence[float]) -> pd.DataFrame:
    """Where q < ½, the answers gained and lost against base if the adapted one stands only if q′ > c·q.

    One row per factor c; 0: always.
    """
    rows = []
    for c in factors:
        paired = statistics.paired(table["right"], selective.chosen(table, table["q"] < 0.5, c))
        counts = {"factor": c, "gained": paired.gained, "lost": paired.lost}
        rows.append(counts | selective.cells(paired.difference, 100))
    return pd.DataFrame(rows)


def hypotheses(table: pd.DataFrame) -> pd.DataFrame:
    """H4 and H5 of docs/hypotheses.md over all of the samples, one row each, `p_holm` over the two.

    Values and intervals as in `selective.hypotheses`; H5's is an area in hundredths, 50 if there is nothing.
    Two more rows, described and without p, say how much of H5 is q alone: small where there is much to gain.
    """
    rows = table.reset_index(drop=True)
    h4 = {"hypothesis": "H4", "what": f"selective, q′ > {FACTOR:g}q − base"}
    out = pd.DataFrame([h4 | selective.against_base(rows, FACTOR), _h5(rows)])
    out["p_holm"] = out.index.map(statistics.holm(out["p"].to_dict()))
    return pd.concat([out, pd.DataFrame(_beside(rows))], ignore_index=True)


def changed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows where q < ½ whose verdict the adapted answer changes: `raised` = q′ / q, and `gained` or not.

    From q = 0, an answer without a readable call, `raised` is infinite.
    """
    always = selective.chosen(table, table["q"] < 0.5, 0)
    rows = table[(always != table["right"]) & table["adapted_q"].notna()]
    with np.errstate(divide="ignore"):
        raised = np.divide(rows["adapted_q"].to_numpy(float), rows["q"].to_numpy(float))
    return rows.assign(raised=raised, gained=~rows["right"])


def _h5(rows: pd.DataFrame) -> dict[str, Any]:
    """How well q′ / q tells gains from losses among the verdicts that adapted answers where q < ½ change."""
    of = changed(rows)
    place, raised, gain = np.full(len(rows), -1), stats.rankdata(of["raised"]), of["gained"].to_numpy(bool)
    place[of.index] = np.arange(len(of))
    said = {"hypothesis": "H5", "what": "AUC of q′ / q, gains against losses", "n": len(of)}
    said |= {"gained": int(gain.sum()), "lost": int((~gain).sum())}
    if gain.all() or not gain.any():
        return said | {"p": 1.0}

    def area(drawn: Places) -> float:
        own = place[drawn][place[drawn] >= 0]
        return 100 * selective.ranked(raised[own], gain[own])

    said["p"] = float(stats.mannwhitneyu(raised[gain], raised[~gain]).pvalue)
    try:
        found = selective.cells(auc(raised.tolist(), gain.tolist()), 100)
    except TooFew:
        found = {"value": area(np.arange(len(rows)))}
    return said | found | selective.over_clusters(rows, area)


def _beside(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """What is left of H5 without base answers that had no likelihood, and over −q as the detector."""
    of = changed(rows)
    read = _h5(rows[~rows.index.isin(of.index[of["q"] == 0])].reset_index(drop=True))
    told = [read | {"hypothesis": "H5, q > 0"}]
    try:
        more = delong(stats.rankdata(of["raised"]).tolist(), (-of["q"]).tolist(), of["gained"].tolist())
        told.append(
            {"hypothesis": "beside H5", "what": "AUC of q′ / q − AUC of −q"} | selective.cells(more, 100)
        )
    except TooFew:
        pass
    return [{k: v for k, v in row.items() if k != "p"} for row in told]
