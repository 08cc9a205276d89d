"""H judged: rates against the threshold, ROC, and the margin beside other estimators. Shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import statistics
from study.analysis.statistics import Estimate, TooFew
from study.analysis.tables import paper
from study.analysis.tables.layout import NOT_RUN, POOLED, in_order, label, rows_of, spread, text

CURVE_COLUMNS = [
    "panel", "benchmark", "samples", "tau", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high",
    "j", "j_low", "j_high", "f1", "uncertain", "auc", "auc_low", "auc_high", "n_right", "n_wrong", "note",
]  # fmt: skip
# Columns of the study's scores, each higher = more certain, and what they are called.
ESTIMATORS = {
    "rss": "RSS margin",
    "random": "random",
    "trivial": "trivial: flag all",
    "perplexity": "perplexity of the answer",
    "entropy": "entropy over tools",
    "smallest_token": "smallest token",
    "disagreement": "disagreement of 5",
}
SUBSETS = {"two or more tools": 2, "all samples": 0}


def estimator_curves(scores: pd.DataFrame, taus: Sequence[float] = (0.95,), seed: int = 0) -> pd.DataFrame:
    """Everything Figure 4 plots, long form; `panel` says what a row is. Shares in [0, 1].

    `scores`: the study's, one row per sample × seed; rows without margin or verdict are left out.
    Panels: `tau` (rates at 0, 0.01, …, 1), `roc`, `auc`, `at_tau` (the asked `taus`),
    `best_out_of_fold`, `best_in_sample` (optimistic), `paper`, and `too_few` with the reason.
    Benchmark 'pooled' is all of them together, which also counts differences between benchmarks.
    Primary rows are `samples` = 'two or more tools': with one tool the margin is 1 by definition.
    """
    rows: list[dict[str, Any]] = []
    if scores.empty:
        return pd.DataFrame(rows, columns=CURVE_COLUMNS)
    scored = scores.dropna(subset=["margin", "base_correct"])
    if scored["benchmark"].nunique() > 1:
        apart = scored["benchmark"] + " " + scored["cluster"]  # no two benchmarks share a cluster
        scored = pd.concat([scored, scored.assign(benchmark=POOLED, cluster=apart)])
    for benchmark in in_order(scored["benchmark"]):
        for samples, least in SUBSETS.items():
            group = scored[(scored["benchmark"] == benchmark) & (scored["n_tools"] >= least)]
            rows += [{"benchmark": benchmark, "samples": samples} | r for r in _curves(group, taus, seed)]
        rows += [
            {"panel": "paper", "benchmark": b, "tau": tau, "tpr": tpr, "fpr": fpr, "j": tpr - fpr}
            for b, tau, tpr, fpr in paper.RATES
            if b == benchmark
        ]
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def _curves(group: pd.DataFrame, taus: Sequence[float], seed: int) -> list[dict[str, Any]]:
    margins, right = group["margin"].to_numpy(float), group["base_correct"].to_numpy(bool)
    seeds = max(group["seed"].nunique(), 1)
    counts: dict[str, Any] = {"n_right": right.sum() / seeds, "n_wrong": (~right).sum() / seeds}
    try:
        statistics.check_enough(right, seeds)
        area = statistics.auc(margins, right, seeds)
    except TooFew as reason:
        return [{"panel": "too_few", "note": str(reason)} | counts]
    curve = statistics.roc(margins, right)
    rows = [
        {"panel": "auc", "auc": area.value, "auc_low": area.low, "auc_high": area.high, "note": area.method}
    ]
    rows += [
        {"panel": "roc", "tau": tau, "fpr": fpr, "tpr": tpr}
        for tau, fpr, tpr in zip(curve.tau, curve.fpr, curve.tpr, strict=True)
    ]
    grid = sorted({*np.round(np.linspace(0, 1, 101), 2), *taus})
    rows += [{"panel": "tau"} | _rate_cells(statistics.rates(margins, right, tau, seeds)) for tau in grid]
    rows += [{"panel": "at_tau"} | _rate_cells(statistics.rates(margins, right, tau, seeds)) for tau in taus]
    try:
        best = statistics.best_tau(margins, right, group["cluster"].tolist(), seed=seed, seeds=seeds)
        rows.append(
            {"panel": "best_out_of_fold", "note": f"{len(best.taus)} folds by cluster"}
            | _rate_cells(best.out_of_fold)
        )
        rows.append(
            {"panel": "best_in_sample", "note": "in sample: optimistic"} | _rate_cells(best.in_sample)
        )
    except TooFew as reason:
        rows.append({"panel": "best_out_of_fold", "note": str(reason)})
    return [r | counts for r in rows]


def _rate_cells(rates: statistics.Rates) -> dict[str, Any]:
    cells: dict[str, Any] = {"tau": rates.tau, "f1": rates.f1, "uncertain": rates.uncertain.value}
    for name in ("tpr", "fpr", "j"):
        e: Estimate = getattr(rates, name)
        cells |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
    return cells


def estimator_view(curves: pd.DataFrame) -> pd.DataFrame:
    """The estimator in numbers, for reading: AUC, and TPR, FPR, J in % at each tau and at the best one."""
    panels = {
        "auc": "",
        "at_tau": "asked",
        "best_out_of_fold": "best, out of fold, median",
        "best_in_sample": "best, in sample",
        "too_few": "",
        "paper": "paper",
    }
    rows = []
    for r in rows_of(curves[curves["panel"].isin(panels)]):
        shown = {k: spread(r, k, scale=100) for k in ("tpr", "fpr", "j")}
        rows.append({
            "benchmark": label(r["benchmark"]),
            "samples": text(r["samples"]),
            "right / wrong": "" if pd.isna(r["n_right"]) else f"{r['n_right']:g} / {r['n_wrong']:g}",
            "AUC": spread(r, "auc", digits=2),
            "tau": "" if pd.isna(r["tau"]) else f"{r['tau']:.3g} ({panels[r['panel']]})",
            "TPR %": shown["tpr"],
            "FPR %": shown["fpr"],
            "J": shown["j"],
            "F1": "" if pd.isna(r["f1"]) else f"{100 * r['f1']:.1f}",
            "note": text(r["note"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def estimator_reading(curves: pd.DataFrame, samples: str = "two or more tools") -> str:
    """One Markdown line per benchmark: what its AUC shows, and what the best threshold is worth."""
    lines = []
    mine = curves[curves["samples"] == samples]
    for benchmark in in_order(mine["benchmark"]):
        panels = {r["panel"]: r for r in rows_of(mine[mine["benchmark"] == benchmark])}
        if "auc" not in panels:
            lines.append(f"- **{label(benchmark)}**: {panels['too_few']['note']}.")
            continue
        area, best, peak = panels["auc"], panels["best_out_of_fold"], panels.get("best_in_sample")
        chance = area["auc_low"] <= 0.5 <= area["auc_high"]
        shows = "not shown to differ from chance" if chance else "the margin tells right from wrong"
        if area["auc_high"] < 0.5:
            shows = "the margin misleads: wrong answers are the surer ones"
        honest = f"J = {spread(best, 'j', scale=100)} out of fold"
        if peak:
            honest += f" (in sample, too good: {100 * peak['j']:.1f} at τ = {peak['tau']:.3g})"
        lines.append(
            f"- **{label(benchmark)}** ({area['n_right']:g} right, {area['n_wrong']:g} wrong): AUC "
            f"{spread(area, 'auc', digits=2)}: {shows}. Best threshold: "
            f"{honest if pd.notna(best['j']) else best['note']}."
        )
    return "\n".join(lines) or "Nothing was scored in this run."


COMPARED = [
    "benchmark", "samples", "estimator", "n_right", "n_wrong", "auc", "auc_low", "auc_high",
    *(f"{at}_{c}" for at in ("tau", "best", "peak") for c in (
        "tau", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high", "j", "j_low", "j_high",
        "f1", "f1_low", "f1_high", "uncertain")),
    "paper_j", "paper_f1", "note",
]  # fmt: skip


def estimator_comparison(
    scores: pd.DataFrame, estimators: Mapping[str, str] = ESTIMATORS, tau: float | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row per benchmark × samples × estimator: AUC, and the rates at three thresholds.

    `estimators`: column of `scores` → its name; each is higher = more certain. Samples without a value of
    *any* of those that were run are left out of all, so that every estimator judges the same answers; one
    that has values for less than half of them is left out itself.
    Prefixes: `tau_` at the asked threshold (None: nowhere), `best_` chosen out of fold by cluster, `peak_`
    chosen and judged in sample, too good. An estimator that never varies (flag everything) is judged by
    flagging all. F1 intervals: percentile bootstrap of the four counts. What was not run says so in `note`.
    """
    rows: list[dict[str, Any]] = []
    if scores.empty:
        return pd.DataFrame(rows, columns=COMPARED)
    for benchmark in in_order(scores["benchmark"]):
        for samples, least in SUBSETS.items():
            group = scores[(scores["benchmark"] == benchmark) & (scores["n_tools"] >= least)]
            n = len(group)
            known = {c: int(group[c].notna().sum()) if c in group else 0 for c in estimators}
            run = [c for c in estimators if known[c] and 2 * known[c] >= n]
            group = group.dropna(subset=[*run, "base_correct"])
            for column, name in estimators.items():
                row = {"benchmark": benchmark, "samples": samples, "estimator": name}
                if column not in run:
                    some = f"run on {known[column]} of {n} samples only"
                    rows.append(row | {"note": some if known[column] else NOT_RUN})
                else:
                    rows.append(row | _compared(group, column, tau, seed))
                if column == "rss" and benchmark == paper.ESTIMATOR["benchmark"]:
                    rows[-1] |= {"paper_j": paper.ESTIMATOR["j"], "paper_f1": paper.ESTIMATOR["f1"]}
    return pd.DataFrame(rows, columns=COMPARED)


def _compared(group: pd.DataFrame, column: str, tau: float | None, seed: int) -> dict[str, Any]:
    values, right = group[column].to_numpy(float), group["base_correct"].to_numpy(bool)
    seeds = max(group["seed"].nunique(), 1)
    row: dict[str, Any] = {"n_right": right.sum() / seeds, "n_wrong": (~right).sum() / seeds, "note": ""}
    try:
        statistics.check_enough(right, seeds)
        area = statistics.auc(values, right, seeds)
        row |= {"auc": area.value, "auc_low": area.low, "auc_high": area.high}
        if tau is not None:
            row |= _prefixed("tau", statistics.rates(values, right, tau, seeds), row, seed)
        if len(np.unique(values)) == 1:
            everything = statistics.rates(values, right, np.inf, seeds)
            return row | _prefixed("best", everything, row, seed) | {"note": "flags everything"}
        best = statistics.best_tau(values, right, group["cluster"].tolist(), seed=seed, seeds=seeds)
    except TooFew as reason:
        return row | {"note": str(reason)}
    row |= _prefixed("best", best.out_of_fold, row, seed)
    return row | _prefixed("peak", best.in_sample, row, seed)


def _prefixed(prefix: str, rates: statistics.Rates, counts: Mapping[str, Any], seed: int) -> dict[str, Any]:
    cells = _rate_cells(rates)
    found, false = rates.tpr.value * counts["n_wrong"], rates.fpr.value * counts["n_right"]
    cells["f1_low"], cells["f1_high"] = _f1_interval(
        found, false, counts["n_wrong"] - found, counts["n_right"] - false, seed
    )
    return {f"{prefix}_{k}": v for k, v in cells.items()}


def _f1_interval(found: float, false: float, missed: float, passed: float, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of F1 = 2 found / (2 found + false + missed), over samples."""
    counts = np.array([found, false, missed, passed])
    n = round(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / counts.sum(), size=statistics.RESAMPLES)
    size = 2 * draws[:, 0] + draws[:, 1] + draws[:, 2]
    f1 = np.divide(2 * draws[:, 0], size, out=np.full(len(draws), np.nan), where=size > 0)
    low, high = np.nanquantile(f1, [0.025, 0.975])
    return float(low), float(high)


def comparison_view(table: pd.DataFrame, samples: str = "two or more tools") -> pd.DataFrame:
    """Estimators for reading: AUC; J at the asked, the best (out of fold) and the peak threshold; F1."""

    def row(r: Mapping[str, Any]) -> dict[str, str]:
        def shown(key: str) -> str:
            return spread(r, key, scale=100)

        return {
            "benchmark": label(r["benchmark"]),
            "estimator": r["estimator"],
            "right / wrong": "" if pd.isna(r["n_right"]) else f"{r['n_right']:g} / {r['n_wrong']:g}",
            "AUC": spread(r, "auc", digits=2),
            "J at τ": shown("tau_j"),
            "J out of fold": shown("best_j"),
            "F1 out of fold": shown("best_f1"),
            "J in sample (too good)": "" if pd.isna(r["peak_j"]) else f"{100 * r['peak_j']:.1f}",
            "paper's J, F1": ""
            if pd.isna(r["paper_j"])
            else f"{100 * r['paper_j']:.2f}, {100 * r['paper_f1']:.2f}",
            "note": text(r["note"]),
        }

    view = pd.DataFrame([row(r) for r in rows_of(table[table["samples"] == samples])])
    asked = len(table) and table["tau_j"].notna().any()
    return view if asked or view.empty else view.drop(columns="J at τ")


def comparison_reading(table: pd.DataFrame, samples: str = "two or more tools") -> str:
    """One Markdown line per benchmark: the estimator of largest AUC, and which others come near it."""
    lines = []
    mine = table[(table["samples"] == samples) & table["auc"].notna()] if len(table) else table
    for benchmark in in_order(mine["benchmark"]):
        rows = mine[mine["benchmark"] == benchmark].sort_values("auc", ascending=False, kind="stable")
        first, *others = rows_of(rows)
        near = [r["estimator"] for r in others if r["auc_high"] >= first["auc_low"]]
        area = spread(first, "auc", digits=2)
        line = f"- **{label(benchmark)}**: largest AUC: {first['estimator']}, {area}"
        lines.append(
            line
            + (f"; its interval overlaps that of {', '.join(near)}." if near else "; no other's reaches it.")
        )
    return "\n".join(lines) or "Too few right or wrong answers to compare estimators in this run."
