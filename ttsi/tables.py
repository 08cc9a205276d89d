"""Tables of the study: records in, one row per result out, with its interval and the paper's number.

Pure apart from `save_table` and `write`. Accuracies, shares and differences are in per cent (points);
every one is beside its n. What was not run, or could not be had, says so in `note` and is never a number.
"""

from __future__ import annotations

import html
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttsi import sources, statistics
from ttsi.statistics import Estimate, Paired, TooFew
from ttsi.types import Sample

BENCHMARKS = {
    "nexusraven": "NexusRaven",
    "sealtool": "SealTool",
    "apibank": "API-Bank",
    "toolalpaca": "ToolAlpaca",
    "bfcl": "BFCL",
}
AVERAGE, POOLED = "avg", "pooled"
LABELS = BENCHMARKS | {
    "fixture": "Fixture",
    AVERAGE: "Average of the three",
    POOLED: "All benchmarks, pooled",
}
NOT_RUN = "not run in this profile"

# Table 1 of the paper (accuracy, %), in the order NexusRaven, SealTool, API-Bank, average.
PAPER_BENCHMARKS = ("nexusraven", "sealtool", "apibank")
PAPER_TABLE1 = {
    ("direct", "base"): (44.03, 66.67, 70.08, 60.26),
    ("direct", "tt_si"): (50.08, 72.43, 74.34, 65.62),
    ("direct", "tt_d"): (52.52, 75.17, 77.29, 68.33),
    ("majority", "base"): (46.56, 69.73, 73.96, 63.42),
    ("majority", "tt_si"): (52.20, 72.93, 75.68, 66.94),
    ("majority", "tt_d"): (54.53, 72.25, 77.56, 68.11),
}
PAPER_N = {"nexusraven": 318, "sealtool": 294, "apibank": 316}
PAPER_MODEL = "qwen2.5-1.5b"
PAPER_SEEDS = 5
# Figure 4 (NexusRaven) and Table 2 (SealTool): benchmark, tau, TPR, FPR.
PAPER_RATES = (
    ("nexusraven", 0.95, 0.88, 0.17),
    ("sealtool", 0.35, 0.42, 0.09),
    ("sealtool", 0.95, 0.96, 0.53),
)

MODELS = {
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M dequantised",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M dequantised",
    "smollm2-135m": "SmolLM2-135M-Instruct, Q4_1 dequantised",
    "qwen2.5-1.5b": "Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen2.5-7B-Instruct",
}
# Rows are ordered by these; arms and benchmarks that are not named come after, by name.
ARMS = ("base", "tt_si", "tt_d", "tt_si_all", "tt_si_certain", "tt_si_icl", "icl", "sft", "sft_ood", "oracle")
INFERENCES = ("direct", "majority")
PRIMARY = ("sealtool", "direct", "tt_si")

CELL = ["benchmark", "inference", "arm", "mode", "model", "tool_order"]
COPY = 0.999  # copy_ratio ignores case and spaces; 1 up to rounding is the seed question itself


def table1_main(
    records: pd.DataFrame, missing: Mapping[str, str] | None = None, benchmarks: Iterable[str] = BENCHMARKS
) -> pd.DataFrame:
    """Table 1: one row per benchmark × inference × arm × mode, accuracies in % with Wilson intervals.

    `records`: the study's, one row per sample × seed (machine failures have status `error`: counted
    in `errors`, in nothing else). `missing`: benchmark → how to get it. `benchmarks`: the rows wanted.

    Columns: `n` samples, `correct` of them (mean over seeds), `accuracy`, `low`, `high`; `computed` and
    `loaded` answers; `uncertain` (% of n), `synthesis_failed` and `copies` (% of the uncertain ones);
    `difference` to base on the same samples in points with `difference_low`, `_high`, `_method`,
    `pairs`, `gained`, `lost`, `mcnemar_p` (exact; several seeds: one per seed), `p` and `p_holm` (Holm
    over the benchmarks other than the primary comparison), `detectable` (points, 80 % power); `paper`,
    `paper_difference`, `setting` (how this differs from the paper's run); `note`.
    The row `avg` stands only where all three of the paper's benchmarks do.
    """
    missing = dict(missing or {})
    groups = records.groupby(CELL, dropna=False, sort=False) if len(records) else ()
    found: dict[tuple[str, ...], _Result] = {tuple(map(str, key)): _Result(rows) for key, rows in groups}
    for key, result in found.items():
        if key[2] != "base" and (base := _base_of(key, found)):
            result.compare(base)
    found |= _averages(found)
    rows = [dict(zip(CELL, key, strict=True)) | r.cells() | _paper_cells(key, r) for key, r in found.items()]
    rows += _absent(found, missing, tuple(dict.fromkeys([*benchmarks, *missing])))
    table = pd.DataFrame(rows, columns=COLUMNS)
    return _with_holm(_in_order(table)).astype(dict.fromkeys(COUNTS, "Int64"))


COUNTS = ["seeds", "n", "errors", "computed", "loaded", "pairs", "gained", "lost"]
COLUMNS = [
    "benchmark", "arm", "inference", "mode", "n", "correct", "accuracy", "low", "high", "computed", "loaded",
    "errors", "seeds", "uncertain", "synthesis_failed", "copies",
    "difference", "difference_low", "difference_high", "difference_method", "pairs", "gained", "lost",
    "mcnemar_p", "p", "p_holm", "detectable", "paper", "paper_difference", "model", "tool_order",
    "setting", "note",
]  # fmt: skip


class _Result:
    """One cell of Table 1: its answers, and, once compared, its paired difference to base."""

    def __init__(self, rows: pd.DataFrame) -> None:
        scored = rows[rows["status"] == "ok"]
        self.rows, self.scored = rows, scored
        # pivot, not pivot_table: an answer that is there twice must be an error, not an average.
        self.correct = scored.assign(correct=scored["correct"].astype(float)).pivot(
            index="sample", columns="seed", values="correct"
        )
        means = self.correct.mean(axis=1)
        self.accuracy = statistics.wilson(float(means.sum()), len(means))
        self.paired: Paired | None = None
        self.difference: Estimate | None = None

    def compare(self, base: _Result) -> None:
        first, second = base.correct.align(self.correct, join="inner")
        if first.size:
            self.paired = statistics.paired(first.to_numpy(), second.to_numpy())
            self.difference = self.paired.difference

    def cells(self) -> dict[str, Any]:
        n, answers = len(self.correct), self.rows["source"].value_counts()
        cells: dict[str, Any] = {
            "n": n,
            "seeds": self.rows["seed"].nunique(),
            "errors": int((self.rows["status"] == "error").sum()),
            "computed": int(answers.get("computed", 0)),
            "loaded": int(answers.get("loaded", 0)),
            "note": "" if n else "no sample was scored: machine failures only",
        }
        if n:
            cells |= {
                "correct": self.accuracy.value * n,
                **_percent(self.accuracy, "accuracy", "low", "high"),
            }
            if "base" not in set(self.rows["arm"]):
                cells |= _shares(self.scored)
        if self.paired:
            p = self.paired
            cells |= _percent(p.difference, "difference", "difference_low", "difference_high")
            cells |= {
                "difference_method": p.difference.method,
                "pairs": int(p.difference.n),
                "gained": p.gained,
                "lost": p.lost,
                "mcnemar_p": "; ".join(f"{x:.4g}" for x in p.p_by_seed),
                "p": p.p,
                "detectable": 100 * p.detectable,
            }
        return cells


class _Average(_Result):
    """The unweighted mean of the paper's three benchmarks, with intervals from theirs."""

    def __init__(self, parts: Sequence[_Result]) -> None:
        self.parts = parts
        self.accuracy = statistics.average([p.accuracy for p in parts])
        differences = [p.difference for p in parts if p.difference]
        self.difference = statistics.average(differences) if len(differences) == len(parts) else None

    def cells(self) -> dict[str, Any]:
        rows = pd.DataFrame([p.cells() for p in self.parts])
        cells: dict[str, Any] = {c: int(rows[c].sum()) for c in ("n", "errors", "computed", "loaded")}
        cells |= {"seeds": int(rows["seeds"].min()), "correct": rows["correct"].sum(), "note": ""}
        cells |= _percent(self.accuracy, "accuracy", "low", "high")
        if self.difference:
            cells |= _percent(self.difference, "difference", "difference_low", "difference_high")
            cells["difference_method"] = self.difference.method
        return cells


def _base_of(key: tuple[str, ...], found: Mapping[tuple[str, ...], _Result]) -> _Result | None:
    """The base answers for the same benchmark, inference, model and tool order; whatever their mode."""
    benchmark, inference, _, mode, *setting = key
    bases = {
        k: r
        for k, r in found.items()
        if (k[0], k[1], k[2], *k[4:]) == (benchmark, inference, "base", *setting)
    }
    return bases.get((benchmark, inference, "base", mode, *setting)) or next(iter(bases.values()), None)


def _averages(found: Mapping[tuple[str, ...], _Result]) -> dict[tuple[str, ...], _Result]:
    averages: dict[tuple[str, ...], _Result] = {}
    for rest in dict.fromkeys(key[1:] for key in found):
        parts = [found[b, *rest] for b in PAPER_BENCHMARKS if (b, *rest) in found]
        if len(parts) == len(PAPER_BENCHMARKS) and all(len(p.correct) for p in parts):
            averages[AVERAGE, *rest] = _Average(parts)
    return averages


def _percent(estimate: Estimate, value: str, low: str, high: str) -> dict[str, float]:
    return {value: 100 * estimate.value, low: 100 * estimate.low, high: 100 * estimate.high}


def _shares(scored: pd.DataFrame) -> dict[str, float]:
    uncertain = scored[scored["uncertain"].astype(bool)]
    shares = {"uncertain": 100 * len(uncertain) / len(scored)}
    if len(uncertain):
        shares["synthesis_failed"] = 100 * float(uncertain["synthesis_failed"].astype(bool).mean())
        shares["copies"] = 100 * float((uncertain["copy_ratio"].astype(float) >= COPY).mean())
    return shares


def _paper_cells(key: tuple[str, ...], result: _Result) -> dict[str, Any]:
    benchmark, inference, arm, mode, model, tool_order = key
    numbers, base = PAPER_TABLE1.get((inference, arm)), PAPER_TABLE1.get((inference, "base"))
    columns = (*PAPER_BENCHMARKS, AVERAGE)
    if numbers is None or base is None or benchmark not in columns:
        return {}
    at = columns.index(benchmark)
    cells = result.cells()
    differs = [MODELS.get(model, model)] if model != PAPER_MODEL else []
    differs += [f"{mode} adapters"] if arm != "base" and mode != "exact" else []
    differs += [f"tools {tool_order}"]
    differs += [f"{cells['seeds']} of {PAPER_SEEDS} seeds"] if cells["seeds"] != PAPER_SEEDS else []
    n, paper_n = cells["n"], PAPER_N.get(benchmark)
    differs += (
        [f"{n} of the paper's {paper_n} {LABELS[benchmark]} samples"] if paper_n not in (None, n) else []
    )
    differs += ["API-Bank's public copy"] if benchmark == "apibank" else []
    paper: dict[str, Any] = {"paper": numbers[at], "setting": "; ".join(differs)}
    return paper | ({"paper_difference": numbers[at] - base[at]} if arm != "base" else {})


def _absent(
    found: Mapping[tuple[str, ...], _Result], missing: Mapping[str, str], benchmarks: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows for what is not there: a benchmark that cannot be had, an arm that the profile leaves out."""
    there = {(k[0], k[1], k[2]) for k in found}
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        if benchmark in missing and not any(b == benchmark for b, _, _ in there):
            rows.append({"benchmark": benchmark, "note": f"missing: {missing[benchmark]}"})
            continue
        in_paper = benchmark in PAPER_BENCHMARKS
        wanted = PAPER_TABLE1 if in_paper else [("direct", "base"), ("direct", "tt_si")]
        for inference, arm in wanted:
            if (benchmark, inference, arm) not in there:
                row: dict[str, Any] = {
                    "benchmark": benchmark,
                    "inference": inference,
                    "arm": arm,
                    "note": NOT_RUN,
                }
                if in_paper:
                    row["paper"] = PAPER_TABLE1[inference, arm][PAPER_BENCHMARKS.index(benchmark)]
                rows.append(row)
    return rows


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    known = {"benchmark": tuple(LABELS), "inference": INFERENCES, "arm": ARMS}
    return table.sort_values(
        list(known),
        key=lambda c: c.map(lambda x: _rank(x, known[str(c.name)])),
        kind="stable",
        ignore_index=True,
    )


def _rank(name: str, known: Sequence[str]) -> str:
    return f"{known.index(name):03d}" if name in known else f"999{name}"


def in_order(names: Iterable[str]) -> list[str]:
    """The benchmarks, each once, in the order that every table and figure keeps; unknown ones last."""
    return sorted(set(names), key=lambda name: _rank(name, tuple(LABELS)))


def label(benchmark: str) -> str:
    """The benchmark's name for reading."""
    return LABELS.get(benchmark, benchmark)


def _with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Adds Holm's p over tt_si − base, direct, on the benchmarks that are not the primary comparison."""
    benchmark, inference, arm = PRIMARY
    of_family = (table["inference"] == inference) & (table["arm"] == arm) & table["p"].notna()
    family = table[of_family & (table["benchmark"] != benchmark)]
    # One run may hold two modes side by side; each is its own family of benchmarks.
    for _, rows in family.groupby(["mode", "model", "tool_order"]):
        adjusted = statistics.holm({str(i): float(p) for i, p in rows["p"].items()})
        table.loc[rows.index, "p_holm"] = list(adjusted.values())
    return table


def table1_view(table: pd.DataFrame) -> pd.DataFrame:
    """Table 1 for reading: intervals in brackets, one decimal, the note where there is no number."""

    def row(r: pd.Series) -> dict[str, str]:
        there = pd.notna(r["accuracy"])
        return {
            "benchmark": label(r["benchmark"]),
            "inference": text(r["inference"]),
            "arm": text(r["arm"]),
            "mode": text(r["mode"]),
            "n": text(r["n"]),
            "accuracy %": bracket(r["accuracy"], r["low"], r["high"]) if there else text(r["note"]),
            "− base, points": bracket(r["difference"], r["difference_low"], r["difference_high"], sign="+"),
            "gained / lost": f"{r['gained']} / {r['lost']}" if pd.notna(r["gained"]) else "",
            "McNemar p": text(r["mcnemar_p"]),
            "uncertain %": text(r["uncertain"]),
            "failed syntheses %": text(r["synthesis_failed"]),
            "copies %": text(r["copies"]),
            "paper %": f"{r['paper']:.2f}" if pd.notna(r["paper"]) else "",
            "errors": text(r["errors"]),
            "computed / loaded": f"{r['computed']} / {r['loaded']}" if pd.notna(r["computed"]) else "",
        }

    return pd.DataFrame([row(r) for _, r in table.iterrows()])


def table1_caption(table: pd.DataFrame) -> str:
    """What a reader needs beside Table 1: intervals, discordant counts, detectable difference, settings."""
    power = [
        f"{label(r['benchmark'])} {r['arm']}, {r['inference']}, {r['mode']}: n = {r['pairs']}, "
        f"{r['gained'] + r['lost']} discordant, "
        f"{'none' if pd.isna(r['detectable']) else format(r['detectable'], '.1f') + ' points'}"
        for r in table[table["pairs"].notna()].to_dict("records")
    ]
    # Each difference once: most rows share theirs.
    settings = list(dict.fromkeys(part for row in table["setting"].dropna() for part in str(row).split("; ")))
    reading = (
        "Accuracy in % with 95 % Wilson interval; difference to base on the same samples, in points, with "
        "its paired 95 % interval (Bonett–Price; bootstrap from n ≥ 50 with ≥ 10 discordant). Uncertain: "
        "% of n; failed syntheses and copies of the seed question: % of the uncertain ones. Machine failures "
        "(errors) are not scored. avg: unweighted mean of the paper's three benchmarks. Intervals take "
        "samples as independent: conditional on NexusRaven's 65 APIs and API-Bank's conversations."
    )
    return "\n\n".join([
        reading,
        *(["Smallest difference detectable at 80 % power: " + "; ".join(power) + "."] if power else []),
        *(["What differs from the paper's run: " + "; ".join(settings) + "."] if settings else []),
    ])  # fmt: skip


def table1_reading(table: pd.DataFrame) -> str:
    """One Markdown line per comparison with base: the numbers, and whether they show a difference."""
    lines = []
    for r in table[table["difference"].notna() & (table["benchmark"] != AVERAGE)].to_dict("records"):
        shown = bracket(r["difference"], r["difference_low"], r["difference_high"], sign="+")
        limit = "no difference" if pd.isna(r["detectable"]) else f"only {r['detectable']:.0f} points or more"
        verdict = "a gain" if r["difference_low"] > 0 else "a loss" if r["difference_high"] < 0 else (
            f"no difference shown, in either direction ({limit} would be found 8 times in 10)"
        )  # fmt: skip
        paper = "" if pd.isna(r["paper_difference"]) else f" The paper's: {r['paper_difference']:+.2f}."
        lines.append(
            f"- **{label(r['benchmark'])}**, {r['arm']}, {r['inference']}, {r['mode']}: {shown} points, "
            f"n = {r['pairs']}, {r['gained']} gained, {r['lost']} lost, p = {r['p']:.3g}: {verdict}.{paper}"
        )
    return "\n".join(lines) or "Nothing was compared with base in this run."


CURVE_COLUMNS = [
    "panel", "benchmark", "samples", "tau", "tpr", "tpr_low", "tpr_high", "fpr", "fpr_low", "fpr_high",
    "j", "j_low", "j_high", "f1", "uncertain", "auc", "auc_low", "auc_high", "n_right", "n_wrong", "note",
]  # fmt: skip
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
            for b, tau, tpr, fpr in PAPER_RATES
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
    for r in curves[curves["panel"].isin(panels)].to_dict("records"):
        shown = {k: bracket(*(100 * r[c] for c in (k, f"{k}_low", f"{k}_high"))) for k in ("tpr", "fpr", "j")}
        rows.append({
            "benchmark": label(r["benchmark"]),
            "samples": text(r["samples"]),
            "right / wrong": "" if pd.isna(r["n_right"]) else f"{r['n_right']:g} / {r['n_wrong']:g}",
            "AUC": bracket(r["auc"], r["auc_low"], r["auc_high"], digits=2),
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
        panels = {r["panel"]: r for r in mine[mine["benchmark"] == benchmark].to_dict("records")}
        if "auc" not in panels:
            lines.append(f"- **{label(benchmark)}**: {panels['too_few']['note']}.")
            continue
        area, best, peak = panels["auc"], panels["best_out_of_fold"], panels.get("best_in_sample")
        chance = area["auc_low"] <= 0.5 <= area["auc_high"]
        shows = "not shown to differ from chance" if chance else "the margin tells right from wrong"
        if area["auc_high"] < 0.5:
            shows = "the margin misleads: wrong answers are the surer ones"
        honest = f"J = {bracket(*(100 * best[k] for k in ('j', 'j_low', 'j_high')))} out of fold"
        if peak:
            honest += f" (in sample, too good: {100 * peak['j']:.1f} at τ = {peak['tau']:.3g})"
        lines.append(
            f"- **{label(benchmark)}** ({area['n_right']:g} right, {area['n_wrong']:g} wrong): AUC "
            f"{bracket(area['auc'], area['auc_low'], area['auc_high'], digits=2)}: {shows}. Best threshold: "
            f"{honest if pd.notna(best['j']) else best['note']}."
        )
    return "\n".join(lines) or "Nothing was scored in this run."


def data_counts(samples: Mapping[str, Sequence[Sample]]) -> pd.DataFrame:
    """One row per benchmark: samples, tools per sample, calls, clusters; `flags`: 'name count' each."""
    rows = []
    for benchmark, group in samples.items():
        tools = np.array([len(s.tools) for s in group])
        flags = Counter(flag for s in group for flag in s.flags)
        rows.append({
            "benchmark": benchmark,
            "samples": len(group),
            "tools_min": tools.min(),
            "tools_median": np.median(tools),
            "tools_max": tools.max(),
            "one_tool": int((tools == 1).sum()),
            "several_calls": sum(len(s.gold) > 1 for s in group),
            "clusters": len({s.cluster or s.id for s in group}),
            "flags": ", ".join(f"{name} {count}" for name, count in sorted(flags.items())),
        })  # fmt: skip
    return pd.DataFrame(rows)


def gold_positions(by_order: Mapping[str, Mapping[str, Sequence[Sample]]]) -> pd.DataFrame:
    """One row per benchmark and tool order: in how many samples the first gold call's tool is listed first.

    `by_order`: tool order → benchmark → samples. Only samples with two or more tools count (`n`).
    `chance`: how many it would be if the gold tool stood anywhere with the same probability.
    """
    rows = []
    for order, samples in by_order.items():
        for benchmark, group in samples.items():
            several = [s for s in group if len(s.tools) > 1 and s.gold]
            first = sum(s.gold[0].name == s.tools[0].name for s in several)
            chance = sum(1 / len(s.tools) for s in several)
            row = {"benchmark": benchmark, "tool_order": order, "n": len(several)}
            rows.append(row | {"first": first, "chance": chance})
    return pd.DataFrame(rows)


def gold_positions_reading(positions: pd.DataFrame) -> str:
    """One Markdown line per benchmark and tool order: how often position alone gives the gold tool."""
    return "\n".join(
        f"- **{label(r['benchmark'])}**, tools {r['tool_order']}: the gold tool stands first in "
        f"{r['first']} of {r['n']} samples; chance would put it there in {r['chance']:.0f}."
        for r in positions[positions["n"] > 0].to_dict("records")
    )


def text(value: Any) -> str:
    """A cell for reading: empty for nothing, floats with one decimal."""
    if isinstance(value, float | np.floating) and not np.isnan(value):
        return f"{value:.1f}"
    return "" if pd.isna(value) else str(value)


def bracket(value: float, low: float, high: float, digits: int = 1, sign: str = "") -> str:
    """'value [low, high]'; the value alone without an interval, empty without a value."""
    if pd.isna(value):
        return ""
    shown = [f"{x:{sign}.{digits}f}".replace("-", "−") for x in (value, low, high)]
    return shown[0] if pd.isna(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown. Cells are escaped: what a model wrote can neither break a row nor be HTML."""

    def cell(value: Any) -> str:
        return html.escape(text(value), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [[cell(c) for c in table.columns], ["---"] * len(table.columns)]
    lines += [[cell(v) for v in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def quote(written: str) -> str:
    """Model text as an HTML block that shows it letter by letter and runs none of it."""
    return f'<pre style="white-space: pre-wrap">{html.escape(written)}</pre>'


def save_table(
    table: pd.DataFrame, name: str, profile: str, caption: str = "", view: pd.DataFrame | None = None
) -> Path:
    """Path of the CSV written to figures/<profile>/<name>.csv, with a `.md` beside it.

    The CSV holds every column, floats to six digits, so that the same numbers give the same bytes.
    The Markdown shows `view` (default: the table) and the caption.
    """
    folder = sources.figures_dir() / profile
    write(folder / f"{name}.md", (markdown(table if view is None else view) + f"\n{caption}\n").encode())
    return write(folder / f"{name}.csv", csv_bytes(table))


def csv_bytes(table: pd.DataFrame) -> bytes:
    """The table as CSV, floats to six significant digits, newline endings."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()


def write(path: Path, content: bytes) -> Path:
    """The path, once it holds the content: written to a temporary name and renamed, so never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
