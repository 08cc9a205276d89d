"""H and its rivals judged: does a number per sample, higher = more certain, tell right answers from wrong?

Shares in [0, 1]. Groups are rows of the study's scores, one per sample × seed, of what is judged together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import detection
from study.analysis.detection import BestTau, Rates
from study.analysis.look import NOT_RUN
from study.analysis.statistics import RESAMPLES, TooFew, holm

CURVES = [
    "panel", "benchmark", "samples", "tau", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high",
    "j", "j_low", "j_high", "f1", "uncertain", "chance", "p", "auc", "auc_low", "auc_high", "n_right",
    "n_wrong", "note",
]  # fmt: skip
COMPARED = [
    "benchmark", "samples", "estimator", "n_right", "n_wrong", "auc", "auc_low", "auc_high",
    "auc_difference", "auc_difference_low", "auc_difference_high", "auc_p", "auc_p_holm",
    *(f"{at}_{c}" for at in ("tau", "best") for c in (
        "tau", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high", "j", "j_low", "j_high",
        "f1", "f1_low", "f1_high", "uncertain")),
    "best_chance", "best_p", *(f"peak_{c}" for c in ("tau", "tpr", "fpr", "j", "f1", "uncertain")),
    "paper_j", "paper_f1", "note",
]  # fmt: skip


def curves(group: pd.DataFrame, taus: Sequence[float], column: str = "margin", seed: int = 0) -> pd.DataFrame:
    """What there is to draw of one estimator, long form, `CURVES`; `panel` says what a row is.

    Panels: `auc`, `roc`, `tau` (rates at 0, 0.01, …, 1), `at_tau` (the asked `taus`), `best_out_of_fold`,
    `best_in_sample` (optimistic); or `too_few` with the reason. `chance`, `p`: see `BestTau`.
    """
    values, right, seeds, counts = _arrays(group, column)
    try:
        detection.check_enough(right, seeds)
        area = detection.auc(values, right, seeds)
    except TooFew as reason:
        return pd.DataFrame([{"panel": "too_few", "note": str(reason)} | counts]).reindex(columns=CURVES)
    curve = detection.roc(values, right)
    roc = pd.DataFrame({"panel": "roc", "tau": curve.tau, "fpr": curve.fpr, "tpr": curve.tpr})
    grid = sorted({*np.round(np.linspace(0, 1, 101), 2), *taus})
    rows = [
        {"panel": panel} | _cells(detection.rates(values, right, tau, seeds))
        for panel, at in (("tau", grid), ("at_tau", taus))
        for tau in at
    ]
    try:
        best = _best(group, column, seed)
        folds = {"panel": "best_out_of_fold", "note": f"{len(best.taus)} folds by cluster"}
        rows += [folds | _cells(best.out_of_fold) | {"chance": best.chance, "p": best.p}]
        rows += [{"panel": "best_in_sample", "note": "in sample: optimistic"} | _cells(best.in_sample)]
    except TooFew as reason:
        rows += [{"panel": "best_out_of_fold", "note": str(reason)}]
    area_row = {"panel": "auc", "auc": area.value, "auc_low": area.low, "auc_high": area.high}
    parts = [pd.DataFrame([area_row | {"note": area.method}]), roc, pd.DataFrame(rows)]
    return pd.concat(parts, ignore_index=True).assign(**counts).reindex(columns=CURVES)


def _arrays(group: pd.DataFrame, column: str) -> tuple[Any, Any, int, dict[str, float]]:
    values, right = group[column].to_numpy(float), group["base_correct"].to_numpy(bool)
    seeds = max(group["seed"].nunique(), 1)
    return values, right, seeds, {"n_right": right.sum() / seeds, "n_wrong": (~right).sum() / seeds}


def _best(group: pd.DataFrame, column: str, seed: int) -> BestTau:
    values, right, seeds, _ = _arrays(group, column)
    clusters, samples = (group[c].tolist() for c in ("cluster", "sample"))
    return detection.best_tau(values, right, clusters, seed=seed, seeds=seeds, samples=samples)


def _cells(rates: Rates) -> dict[str, float]:
    cells = {"tau": rates.tau, "f1": rates.f1, "uncertain": rates.uncertain.value}
    for name in ("tpr", "fpr", "j"):
        e = getattr(rates, name)
        cells |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
    return cells


def side_by_side(
    group: pd.DataFrame, estimators: Mapping[str, str], tau: float | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row per estimator, `COMPARED`: AUC, and the rates at three thresholds.

    `estimators`: column of the group → its name. Samples without a value of *any* of those that were run are
    left out of all, so that every estimator judges the same answers; one that has values for less than half
    of them is left out itself. Prefixes: `tau_` at the asked threshold (None: nowhere), `best_` chosen out of
    fold by cluster, `peak_` chosen and judged in sample, too good; a chosen threshold has no intervals, but
    `best_chance` and `best_p` (`BestTau`). An estimator that never varies is judged by flagging all. F1
    intervals: percentile bootstrap. `auc_difference`: to the first estimator's AUC, by DeLong's test of areas
    over the same answers, Holm over the others. What was not run says so in `note`.
    """
    n = len(group)
    known = {c: int(group[c].notna().sum()) if c in group else 0 for c in estimators}
    run = [c for c in estimators if known[c] and 2 * known[c] >= n]
    group = group.dropna(subset=[*run, "base_correct"])
    rows: list[dict[str, Any]] = []
    for column, name in estimators.items():
        few = {"note": f"run on {known[column]} of {n} samples only" if known[column] else NOT_RUN}
        rows.append({"estimator": name} | (_judged(group, column, tau, seed) if column in run else few))
    table = pd.DataFrame(rows, columns=COMPARED)
    return _differing(table, group, [c if c in run else "" for c in estimators])


def _differing(table: pd.DataFrame, group: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with each area's difference to the first one's; at one seed, since it counts samples."""
    first, *others = columns
    right, found = group["base_correct"].tolist(), {}
    for row, column in enumerate(others, 1):
        if not first or not column or group["seed"].nunique() > 1 or group[column].nunique() < 2:
            continue
        try:
            differs = detection.delong(group[column].tolist(), group[first].tolist(), right)
        except TooFew:
            return table
        found[row] = detection.pooled([differs])[1]
        table.loc[row, ["auc_difference", "auc_difference_low", "auc_difference_high", "auc_p"]] = (
            differs.value, differs.low, differs.high, found[row],
        )  # fmt: skip
    for row, p in holm(found).items():
        table.loc[row, "auc_p_holm"] = p
    return table


def _judged(group: pd.DataFrame, column: str, tau: float | None, seed: int) -> dict[str, Any]:
    values, right, seeds, counts = _arrays(group, column)
    row: dict[str, Any] = {**counts, "note": ""}

    def at(name: str, rates: Rates, **other: float) -> dict[str, float]:
        return {f"{name}_{k}": v for k, v in (_cells(rates) | other).items()}

    try:
        detection.check_enough(right, seeds)
        area = detection.auc(values, right, seeds)
        row |= {"auc": area.value, "auc_low": area.low, "auc_high": area.high}
        if tau is not None:
            asked = detection.rates(values, right, tau, seeds)
            row |= at("tau", asked, **_f1_interval(asked, counts, seed))
        if len(np.unique(values)) == 1:
            everything = detection.rates(values, right, np.inf, seeds)
            interval = _f1_interval(everything, counts, seed)
            return row | at("best", everything, **interval) | {"note": "flags everything"}
        best = _best(group, column, seed)
    except TooFew as reason:
        return row | {"note": str(reason)}
    found = at("best", best.out_of_fold, chance=best.chance, p=best.p)
    return row | found | at("peak", best.in_sample)


def _f1_interval(rates: Rates, counts: Mapping[str, float], seed: int) -> dict[str, float]:
    """95 % percentile bootstrap of F1 = 2 found / (2 found + false + missed), over samples."""
    found, false = rates.tpr.value * counts["n_wrong"], rates.fpr.value * counts["n_right"]
    cells = np.array([found, false, counts["n_wrong"] - found, counts["n_right"] - false])
    n = round(cells.sum())
    draws = np.random.default_rng(seed).multinomial(n, cells / cells.sum(), size=RESAMPLES)
    size = 2 * draws[:, 0] + draws[:, 1] + draws[:, 2]
    f1 = np.divide(2 * draws[:, 0], size, out=np.full(len(draws), np.nan), where=size > 0)
    return dict(zip(("f1_low", "f1_high"), map(float, np.nanquantile(f1, [0.025, 0.975])), strict=True))
