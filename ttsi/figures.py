"""Figures of the study, drawn from the tables that hold their values.

One `style()`, one colour per arm wherever it appears, an interval on every estimate, n in the caption.
`save_figure` writes PDF, PNG and the plotted values as CSV; the same values give the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttsi import sources
from ttsi.statistics import wilson
from ttsi.tables import INFERENCES, csv_bytes, in_order, label, write

# Okabe and Ito's eight and three of Paul Tol's muted ones: told apart with every common colour blindness.
COLOURS = {
    "base": "#4d4d4d",
    "tt_si": "#0072b2",
    "tt_d": "#d55e00",
    "tt_si_all": "#56b4e9",
    "tt_si_certain": "#332288",
    "tt_si_icl": "#cc79a7",
    "icl": "#e69f00",
    "sft": "#009e73",
    "sft_ood": "#999933",
    "oracle": "#000000",
    "teacher": "#882255",
}
WRONG, RIGHT, NEUTRAL = "#aa3377", "#117733", "#222222"
WIDTH = 7.2  # inches: a text column on A4


@contextmanager
def style() -> Iterator[None]:
    """The one look of every figure, for the time of a with block; the caller's settings come back after."""
    with mpl.rc_context({
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.edgecolor": "#666666",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
    }):  # fmt: skip
        yield


def save_figure(figure: Figure, values: pd.DataFrame, name: str, profile: str) -> Path:
    """Path of the PNG, beside a PDF and a CSV of the plotted values, in figures/<profile>/."""
    folder = sources.figures_dir() / profile
    # Dates and versions in the metadata would make every rebuild a change.
    undated: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    with style():
        for kind, metadata in undated.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            write(folder / f"{name}.{kind}", buffer.getvalue())
    write(folder / f"{name}.csv", csv_bytes(values))
    return folder / f"{name}.png"


def figure4_estimator(curves: pd.DataFrame, tau: float = 0.95, samples: str = "two or more tools") -> Figure:
    """Figure 4: per benchmark, TPR, FPR and J against tau (left), ROC with AUC (right), 95 % bands.

    `curves`: from `tables.estimator_curves`. Benchmarks with too few right or wrong answers are
    named in the caption, not drawn. Diamonds: the paper's numbers.
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
    caption += "".join(f" {label(r['benchmark'])} not drawn, {r['note']}." for r in few.to_dict("records"))
    if not drawn:
        return _notice("Too few right or wrong answers to draw a curve", caption)
    with style():
        figure, grid = _panels(len(drawn), [1.62, 1], 2.0, caption, gap=0.5, right=0.1, between=0.32)
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
        axes.plot(
            lines["tau"],
            lines[column],
            dash,
            color=colour,
            lw=thick,
            drawstyle="steps-post",
            zorder=4 - thick,
        )
        ends[column] = float(lines[column].iloc[-1])
    paper = rows[rows["panel"] == "paper"]
    for column, (_, colour, _) in named.items():
        axes.plot(
            paper["tau"], paper[column], "D", ms=5, mfc="white", mec=colour, mew=1.2, clip_on=False, zorder=5
        )
    for (name, colour, _), height in zip(named.values(), _apart(list(ends.values()), 0.09), strict=True):
        axes.annotate(name, (1.0, height), xytext=(9, 0), textcoords="offset points", color=colour,
                      va="center", weight="bold", annotation_clip=False)  # fmt: skip
    axes.axvline(tau, color="#888888", lw=0.9, ls=":", zorder=1)
    axes.axhline(0, color="#666666", lw=0.7)
    bottom = min(0.0, float(lines["j_low"].min()))
    axes.set(xlim=(0, 1), ylim=(np.floor(bottom * 5) / 5, 1), ylabel="share of answers")
    n_right, n_wrong = lines["n_right"].iloc[0], lines["n_wrong"].iloc[0]
    axes.set_title(label(rows["benchmark"].iloc[0]))
    axes.set_title(
        f"{n_right:g} right, {n_wrong:g} wrong", loc="right", fontsize=7.5, weight="normal", color="#444444"
    )


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
    axes.plot(
        paper["fpr"], paper["tpr"], "D", ms=5, mfc="white", mec=NEUTRAL, mew=1.2, zorder=5, clip_on=False
    )
    for r in paper.to_dict("records"):
        axes.annotate(f"τ = {r['tau']:g}", (r["fpr"], r["tpr"]), xytext=(0, 5), textcoords="offset points",
                      fontsize=6.5, ha="center", va="bottom", color="#444444")  # fmt: skip
    shown = f"AUC {area['auc']:.2f} [{area['auc_low']:.2f}, {area['auc_high']:.2f}]"
    axes.text(
        0.98, 0.05, f"{shown}\n● τ = {tau:g}", ha="right", va="bottom", transform=axes.transAxes, fontsize=7.5
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="TPR: wrong answers flagged")


def margins_figure(scores: pd.DataFrame, tau: float = 0.95) -> Figure:
    """Where the margins lie: one dot per scored sample with two or more tools, by right and wrong answer.

    The bar and its number: the share of that row below tau, so the upper row's is the FPR and the
    lower row's the TPR, with Wilson intervals.
    """
    scored = scores[scores["n_tools"] > 1].dropna(subset=["margin", "base_correct"])
    drawn = in_order(scored["benchmark"])
    caption = (
        "Margin between the two best-scored tools, one dot per sample with two or more tools (height within "
        f"a row means nothing). Right: share with margin < τ = {tau:g} and its 95 % Wilson interval."
    )
    if not drawn:
        return _notice("No sample with two or more tools was scored", caption)
    with style():
        figure, grid = _panels(len(drawn), [1], 0.62, caption, gap=0.45, right=1.55)
        for axes, benchmark in zip(grid[:, 0], drawn, strict=True):
            rows = scored[scored["benchmark"] == benchmark]
            for height, (right, colour) in enumerate([(False, WRONG), (True, RIGHT)]):
                margins = rows.loc[rows["base_correct"].astype(bool) == right, "margin"].to_numpy(float)
                # Evenly spread by rank instead of random jitter: no dot moves on a rebuild.
                lift = 0.3 * (2 * ((np.arange(len(margins)) * 0.618034) % 1) - 1)
                axes.plot(margins, height + lift, "o", ms=3, mew=0, alpha=0.5, color=colour, clip_on=False)
                share = wilson(int((margins < tau).sum()), len(margins))
                percent = [100 * x for x in (share.value, share.low, share.high)]
                shown = "{:.0f} % [{:.0f}, {:.0f}]  ".format(*percent) if len(margins) else ""
                beside: dict[str, Any] = {
                    "xy": (1.02, height),
                    "xycoords": ("axes fraction", "data"),
                    "va": "center",
                }
                n = len(margins)
                axes.annotate(f"{shown}n = {n}", **beside, color=colour, fontsize=7.5, annotation_clip=False)
            axes.axvline(tau, color="#888888", lw=0.9, ls=":")
            axes.set(yticks=[0, 1], ylim=(-0.55, 1.55), xlim=(0, 1), title=label(benchmark))
            axes.set_yticklabels(["wrong", "right"])
            axes.grid(axis="y", visible=False)
            axes.tick_params(labelbottom=benchmark == drawn[-1])
        axes.set_xlabel("margin (0 = a tie, 1 = sure)")
    return figure


def main_results_figure(table: pd.DataFrame) -> Figure:
    """Table 1 as a picture: accuracy of each arm (left), difference to base on the same samples (right)."""
    there = table[table["accuracy"].notna()]
    caption = (
        "Left: accuracy, 95 % Wilson interval. Right: difference to base on the same samples, paired 95 % "
        "interval; beside it samples gained, lost. Diamonds: the paper's (Qwen2.5-1.5B-Instruct, exact)."
    )
    if there.empty:
        return _notice("No benchmark was scored", caption)
    order = in_order(there["benchmark"])
    keys = [
        (b, k)
        for b in order
        for k in there[there["benchmark"] == b]
        .sort_values("inference", key=lambda c: c.map(INFERENCES.index), kind="stable")
        .index
    ]
    with style():
        tall = 0.2 * len(keys) + 0.26 * len(order)
        figure, grid = _panels(1, [1.35, 1], tall, caption, left=1.25, right=0.6, between=0.08)
        left, right = grid[0]
        height, ticks = 0.6, []
        for number, (benchmark, key) in enumerate(keys):
            if not number or benchmark != keys[number - 1][0]:
                height += 0.4
                n = there.loc[key, "n"]
                left.annotate(f"{label(benchmark)}, n = {n}", (0, height),
                              xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                              weight="bold", va="center")  # fmt: skip
                for axes in (left, right):
                    axes.axhline(height - 0.55, color="#cccccc", lw=0.7)
                height += 0.85
            row = there.loc[key]
            _draw_result(left, right, row, height)
            ticks.append((height, arm_label(row, there)))
            height += 1
        left.set(xlim=(0, 100), xlabel="accuracy, %", title="Accuracy")
        left.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(height - 0.35, 0.45)
        _symmetric(right)
        right.axvline(0, color="#444444", lw=0.9)
        right.set(xlabel="difference to base, points", title="Difference to base")
        right.set_title("gained, lost", loc="right", fontsize=7, weight="normal", color="#444444", x=1.22)
        right.set_yticks([])
    return figure


def arm_label(row: pd.Series, table: pd.DataFrame) -> str:
    """The arm, with inference and mode where the table holds more than one of them."""
    parts = [str(row["arm"])]
    parts += [str(row["inference"])] if table["inference"].nunique() > 1 else []
    adapted = table[table["arm"] != "base"]
    parts += [str(row["mode"])] if row["arm"] != "base" and adapted["mode"].nunique() > 1 else []
    return ", ".join(parts)


def _draw_result(left: Axes, right: Axes, row: pd.Series, height: float) -> None:
    colour = COLOURS.get(row["arm"], NEUTRAL)
    _draw_interval(left, row["accuracy"], row["low"], row["high"], height, colour)
    diamond: Mapping[str, Any] = {
        "marker": "D",
        "ms": 5,
        "mfc": "white",
        "mec": colour,
        "mew": 1.2,
        "zorder": 3,
    }
    if pd.notna(row["paper"]):
        left.plot(row["paper"], height, **diamond)
    if pd.notna(row["difference"]):
        _draw_interval(
            right, row["difference"], row["difference_low"], row["difference_high"], height, colour
        )
        if pd.notna(row["gained"]):
            right.annotate(f"+{row['gained']} −{row['lost']}", (1, height), xytext=(3, 0), fontsize=7,
                           xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                           color=colour, annotation_clip=False)  # fmt: skip
        if pd.notna(row["paper_difference"]):
            right.plot(row["paper_difference"], height, **diamond)


def _draw_interval(axes: Axes, value: float, low: float, high: float, height: float, colour: str) -> None:
    axes.plot([low, high], [height, height], color=colour, lw=1.6, solid_capstyle="butt")
    axes.plot(value, height, "o", color=colour, ms=5, zorder=4)


def gold_first_figure(positions: pd.DataFrame) -> Figure:
    """How often the gold tool is listed first, per benchmark and tool order; tick: chance.

    `positions`: from `tables.gold_positions`.
    """
    colours = {"original": "#aa4499", "shuffled": "#44aa99"}  # no arm's
    there = positions[positions["n"] > 0]
    order = in_order(there["benchmark"])
    caption = (
        "Samples with two or more tools. Dots: share, with 95 % Wilson interval; ticks: what chance gives."
    )
    if not order:
        return _notice("No sample has two or more tools", caption)
    with style():
        figure, grid = _panels(1, [1], 0.5 * len(order), caption, left=1.5, right=0.6)
        axes = grid[0, 0]
        for row in there.to_dict("records"):
            share = wilson(row["first"], row["n"])
            height = order.index(row["benchmark"]) + (0.17 if row["tool_order"] == "shuffled" else -0.17)
            colour = colours[row["tool_order"]]
            _draw_interval(axes, 100 * share.value, 100 * share.low, 100 * share.high, height, colour)
            axes.plot(100 * row["chance"] / row["n"], height, "|", color=NEUTRAL, ms=9, mew=1.2, zorder=5)
            axes.annotate(row["tool_order"], (100 * share.high, height), xytext=(5, 0), color=colour,
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        sizes = there.groupby("benchmark")["n"].max()
        axes.set_yticks(range(len(order)), [f"{label(b)}, n = {sizes[b]}" for b in order])
        axes.set(xlim=(0, 100), ylim=(len(order) - 0.5, -0.5), xlabel="gold tool listed first, % of samples")
        axes.grid(axis="y", visible=False)
    return figure


def _apart(heights: list[float], least: float) -> list[float]:
    """The heights, in the order given, moved just enough to stand `least` apart and none above 1."""
    order = np.argsort(heights, kind="stable")
    moved = np.asarray(heights, dtype=float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    moved[-1] = min(moved[-1], 1.0)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - least)
    return [float(moved[list(order).index(k)]) for k in range(len(heights))]


def _symmetric(axes: Axes) -> None:
    """Zero in the middle, so that a gain and a loss of the same size look the same."""
    reach = max(map(abs, axes.dataLim.intervalx), default=1.0)
    axes.set_xlim(-1.08 * max(reach, 1.0), 1.08 * max(reach, 1.0))


def _panels(
    rows: int,
    widths: list[float],
    height: float,
    caption: str,
    left: float = 0.55,
    right: float = 0.55,
    gap: float = 0.3,
    between: float = 0.0,
) -> tuple[Figure, Any]:
    """A figure with its caption and a (rows, len(widths)) array of axes, each `height` tall; all in inches,
    but `between`, which is a share of a panel's width.

    Laid out by hand: an automatic layout moves with the length of a label, so no two runs look alike.
    """
    lines = textwrap.wrap(caption, 132)
    bottom, top = 0.5 + 0.135 * len(lines), 0.3
    full = bottom + rows * height + (rows - 1) * gap + top
    figure = Figure(figsize=(WIDTH, full))
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    figure.subplots_adjust(
        left=left / WIDTH, right=1 - right / WIDTH, bottom=bottom / full, top=1 - top / full,
        hspace=gap / height, wspace=between,
    )  # fmt: skip
    figure.text(
        0.1 / WIDTH, 0.06 / full, "\n".join(lines), ha="left", va="bottom", fontsize=6.8, color="#444444"
    )
    return figure, axes


def _notice(message: str, caption: str) -> Figure:
    with style():
        figure, axes = _panels(1, [1], 0.8, caption)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, message, ha="center", fontsize=10, weight="bold")
    return figure
