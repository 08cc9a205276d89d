"""Figure 4: what H's margin finds, where it lies, and how it stands beside other estimators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import NEUTRAL, RIGHT, WRONG, apart, draw_interval, notice, panels, style
from study.analysis.look import in_order, label, rows_of
from study.analysis.statistics import wilson

DIAMOND: dict[str, Any] = {
    "marker": "D", "ls": "", "ms": 5, "mfc": "white", "mew": 1.2, "zorder": 5, "clip_on": False
}  # fmt: skip
BESIDE: dict[str, Any] = {"loc": "right", "fontsize": 7.5, "weight": "normal", "color": "#444444"}


def figure4_estimator(curves: pd.DataFrame, tau: float = 0.95, samples: str = "two or more tools") -> Figure:
    """Figure 4: per benchmark, TPR, FPR and J against tau (left), ROC with AUC (right), 95 % bands.

    `curves`: notebook 01's. Benchmarks with too few right or wrong answers are named in the caption, not
    drawn. Diamonds: the paper's numbers.
    """
    mine = curves[(curves["samples"] == samples) | (curves["panel"] == "paper")]
    drawn = in_order(mine.loc[mine["panel"] == "roc", "benchmark"])
    few = mine[mine["panel"] == "too_few"]
    caption = (
        "H flags a sample when margin < τ; TPR: wrong base answers flagged, FPR: right ones flagged, "
        f"J = TPR − FPR. Samples with {samples}. Shaded (J: outlined): 95 % intervals, Wilson "
        "(J: Newcombe; AUC: DeLong). "
        f"Dotted line: τ = {tau:g}."
    )
    if set(drawn) & set(mine.loc[mine["panel"] == "paper", "benchmark"]):
        caption += " Diamonds: the paper's numbers (Qwen2.5-1.5B-Instruct)."
    caption += "".join(f" {label(r['benchmark'])} not drawn, {r['note']}." for r in rows_of(few))
    if not drawn:
        return notice("Too few right or wrong answers to draw a curve", caption)
    with style():
        figure, grid = panels(len(drawn), [1.62, 1], 2.0, caption, gap=0.5, right=0.1, between=0.32)
        for row, (benchmark, (left, right)) in enumerate(zip(drawn, grid, strict=True)):
            rows = mine[mine["benchmark"] == benchmark]
            _draw_rates(left, rows, tau)
            _draw_roc(right, rows, tau)
            if row == len(drawn) - 1:
                left.set_xlabel("threshold τ")
                right.set_xlabel("FPR: right answers flagged")
    return figure


def _draw_rates(axes: Axes, rows: pd.DataFrame, tau: float) -> None:
    lines = rows[rows["panel"] == "tau"]
    named = {"j": ("J", NEUTRAL, "-"), "fpr": ("FPR", RIGHT, "--"), "tpr": ("TPR", WRONG, "-")}
    ends = {}
    for column, (_, colour, dash) in named.items():
        low, high = lines[f"{column}_low"], lines[f"{column}_high"]
        if column == "j":  # outlined, not filled: three bands on top of each other cannot be told apart
            for edge in (low, high):
                axes.plot(lines["tau"], edge, color=colour, lw=0.6, ls=(0, (1, 1.5)), drawstyle="steps-post")
        else:
            axes.fill_between(lines["tau"], low, high, color=colour, alpha=0.14, lw=0, step="post")
        thick = 1.2 if column == "j" else 2.0  # where J lies on TPR, both are seen
        axes.plot(lines["tau"], lines[column], dash, color=colour, lw=thick, drawstyle="steps-post",
                  zorder=4 - thick)  # fmt: skip
        ends[column] = float(lines[column].iloc[-1])
    paper = rows[rows["panel"] == "paper"]
    for column, (_, colour, _) in named.items():
        axes.plot(paper["tau"], paper[column], mec=colour, **DIAMOND)
    for (name, colour, _), height in zip(named.values(), apart(list(ends.values()), 0.09), strict=True):
        axes.annotate(name, (1.0, height), xytext=(9, 0), textcoords="offset points", color=colour,
                      va="center", weight="bold", annotation_clip=False)  # fmt: skip
    axes.axvline(tau, color="#888888", lw=0.9, ls=":", zorder=1)
    axes.axhline(0, color="#666666", lw=0.7)
    bottom = min(0.0, float(lines["j_low"].min()))
    axes.set(xlim=(0, 1), ylim=(np.floor(bottom * 5) / 5, 1), ylabel="share of answers")
    n_right, n_wrong = lines["n_right"].iloc[0], lines["n_wrong"].iloc[0]
    axes.set_title(label(rows["benchmark"].iloc[0]))
    axes.set_title(f"{n_right:g} right, {n_wrong:g} wrong", **BESIDE)


def _draw_roc(axes: Axes, rows: pd.DataFrame, tau: float) -> None:
    curve, area = rows[rows["panel"] == "roc"], rows[rows["panel"] == "auc"].iloc[0]
    axes.plot([0, 1], [0, 1], color="#aaaaaa", lw=0.8, ls="--")
    axes.plot(curve["fpr"], curve["tpr"], color=NEUTRAL, clip_on=False)
    here = rows[(rows["panel"] == "tau") & np.isclose(rows["tau"].astype(float), tau)]
    if len(here):
        at = here.iloc[0]
        low = [[at["fpr"] - at["fpr_low"]], [at["fpr_high"] - at["fpr"]]]
        high = [[at["tpr"] - at["tpr_low"]], [at["tpr_high"] - at["tpr"]]]
        axes.errorbar(at["fpr"], at["tpr"], xerr=low, yerr=high, fmt="o", ms=4.5, color=NEUTRAL,
                      elinewidth=0.9, clip_on=False, zorder=4)  # fmt: skip
    paper = rows[rows["panel"] == "paper"]
    axes.plot(paper["fpr"], paper["tpr"], mec=NEUTRAL, **DIAMOND)
    for r in rows_of(paper):
        axes.annotate(f"τ = {r['tau']:g}", (r["fpr"], r["tpr"]), xytext=(0, 5), textcoords="offset points",
                      fontsize=6.5, ha="center", va="bottom", color="#444444")  # fmt: skip
    shown = f"AUC {area['auc']:.2f} [{area['auc_low']:.2f}, {area['auc_high']:.2f}]"
    shown += f"\n● τ = {tau:g}"
    axes.text(0.98, 0.05, shown, ha="right", va="bottom", transform=axes.transAxes, fontsize=7.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="TPR: wrong answers flagged")


def margins_figure(scores: pd.DataFrame, tau: float = 0.95) -> Figure:
    """Where the margins lie: one dot per scored sample with two or more tools, by right and wrong answer.

    The bar and its number: the share of that row below tau, so the upper row's is the FPR and the
    lower row's the TPR, with Wilson intervals. Counts are divided by the run seeds, as in figure 4.
    """
    scored = scores[scores["n_tools"] > 1].dropna(subset=["margin", "base_correct"])
    drawn = in_order(scored["benchmark"])
    caption = (
        "Margin between the two best-scored tools, one dot per sample with two or more tools (height within "
        f"a row means nothing). Right: share with margin < τ = {tau:g} and its 95 % Wilson interval."
    )
    if scored["seed"].nunique() > 1:
        caption += " Several run seeds: a dot each, n counts samples."
    if not drawn:
        return notice("No sample with two or more tools was scored", caption)
    with style():
        figure, grid = panels(len(drawn), [1], 0.62, caption, gap=0.45, right=1.55)
        for axes, benchmark in zip(grid[:, 0], drawn, strict=True):
            rows = scored[scored["benchmark"] == benchmark]
            seeds = rows["seed"].nunique()
            for height, (right, colour) in enumerate([(False, WRONG), (True, RIGHT)]):
                margins = rows.loc[rows["base_correct"].astype(bool) == right, "margin"].to_numpy(float)
                # Evenly spread by rank instead of random jitter: no dot moves on a rebuild.
                lift = 0.3 * (2 * ((np.arange(len(margins)) * 0.618034) % 1) - 1)
                axes.plot(margins, height + lift, "o", ms=3, mew=0, alpha=0.5, color=colour, clip_on=False)
                n = len(margins) / seeds
                share = wilson((margins < tau).sum() / seeds, n)
                percent = [100 * x for x in (share.value, share.low, share.high)]
                shown = "{:.0f} % [{:.0f}, {:.0f}]  ".format(*percent) if len(margins) else ""
                axes.annotate(f"{shown}n = {n:g}", (1.02, height), xycoords=("axes fraction", "data"),
                              va="center", color=colour, fontsize=7.5, annotation_clip=False)  # fmt: skip
            axes.axvline(tau, color="#888888", lw=0.9, ls=":")
            axes.set(yticks=[0, 1], ylim=(-0.55, 1.55), xlim=(0, 1), title=label(benchmark))
            axes.set_yticklabels(["wrong", "right"])
            axes.grid(axis="y", visible=False)
            axes.tick_params(labelbottom=benchmark == drawn[-1])
        axes.set_xlabel("margin (0 = a tie, 1 = sure)")
    return figure


def figure4_rivals(table: pd.DataFrame, samples: str = "two or more tools") -> Figure:
    """Figure 4, right: AUC, and J and F1 at the threshold chosen out of fold, per benchmark and estimator.

    `table`: notebook 01's.
    """
    mine = table[(table["samples"] == samples) & table["auc"].notna()] if len(table) else table
    drawn = in_order(mine["benchmark"])
    caption = (
        f"Samples with {samples}. AUC: DeLong 95 %. J and F1 at the threshold chosen out of fold, "
        "which leaves them without an interval; ticks: what 95 % of useless scores (these, shuffled among "
        "the samples) stay below. Trivial: everything flagged; Newcombe, bootstrap. All estimators judge the "
        "same answers. Grey lines: what knowing nothing gives."
    )
    if mine["paper_j"].notna().any():
        caption += " Diamonds: the paper's (Qwen2.5-1.5B-Instruct, threshold chosen in sample)."
    absent = sorted(set(table["estimator"]) - set(mine["estimator"])) if len(mine) else []
    caption += f" Not run in this profile: {', '.join(absent)}." if absent else ""
    if not drawn:
        return notice("Too few right or wrong answers to compare estimators", caption)
    shown = (("auc", 1, "AUC", 0.5), ("best_j", 100, "J, %", 0.0), ("best_f1", 100, "F1, %", None))
    most = int(mine.groupby("benchmark").size().max())
    lowest = min(0.0, 100 * float(mine[["best_j", "best_j_low"]].min().min())) - 4
    with style():
        figure, grid = panels(
            len(drawn), [1, 1, 1], 0.2 * most + 0.15, caption, left=1.75, gap=0.75, right=0.15, between=0.1
        )
        for row, benchmark in zip(grid, drawn, strict=True):
            lines = rows_of(mine[mine["benchmark"] == benchmark])
            for axes, (column, scale, name, chance) in zip(row, shown, strict=True):
                for height, r in enumerate(lines):
                    colour = RIGHT if height == 0 else NEUTRAL
                    value, low, high = (r[f"{column}{end}"] for end in ("", "_low", "_high"))
                    if pd.notna(value):
                        draw_interval(axes, scale * value, scale * low, scale * high, height, colour)
                    if column == "best_j":
                        axes.plot(scale * r["best_chance"], height, "|", color="#888888", ms=8, mew=1.2)
                    theirs = r.get(column.replace("best", "paper")) if column.startswith("best") else None
                    if theirs is not None and pd.notna(theirs):
                        axes.plot(scale * theirs, height, mec=colour, **DIAMOND)
                if chance is not None:
                    axes.axvline(scale * chance, color="#aaaaaa", lw=0.9)
                start = lowest if column == "best_j" else 0
                axes.set(ylim=(most - 0.5, -0.5), xlim=(start, scale), xlabel=name)
                axes.set_xticks([scale * x / 4 for x in range(4)])
                axes.grid(axis="y", visible=False)
                axes.set_yticks(range(len(lines)), [r["estimator"] for r in lines] if axes is row[0] else [])
            row[0].set_title(label(benchmark))
            n = f"{lines[0]['n_right']:g} right, {lines[0]['n_wrong']:g} wrong"
            row[2].set_title(n, **BESIDE)
    return figure
